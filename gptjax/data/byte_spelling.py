"""How GPT-2's vocabulary files spell bytes: as printable characters."""

# Those that Latin-1 prints as themselves, the others as the characters from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_CHARACTER_OF = {byte: chr(byte) for byte in _PRINTED}
_CHARACTER_OF |= {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}


def to_bytes(token: str) -> bytes:
    """KeyError: it is not spelled so."""
    return bytes(_BYTE_OF[character] for character in token)


def from_bytes(piece: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in piece)
