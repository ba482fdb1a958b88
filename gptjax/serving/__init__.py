"""Many texts share one model: continuous batching, for a file of prompts and for a server with an
HTTP interface and a page to play on."""
