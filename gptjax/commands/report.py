"""gptjax report RUN ...: how training went, as a page or a picture."""

import dataclasses

from gptjax import files
from gptjax.commands import flags
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class ReportFlags(Config):
    """Show how one or more runs went: losses over steps, tokens and time, speeds, samples, settings
    and what differs between them."""

    out: str | None = None
    """The file to write; its ending chooses the format: .html a page that is complete in itself,
    .png, .svg or .pdf a picture of the losses. None: report.html in the (first) run."""
    live: bool = False
    """Instead, show the page on this machine and keep it up to date, until Ctrl-C."""
    port: int = 0
    """Of the live page; 0 takes a free one."""

    def problems(self) -> list[str]:
        out = ["--out is empty"] * (self.out == "") + self._check_ints(0, "port")
        out += [f"port {self.port} must be below 65536"] * (self.port > 65535)
        return out + ["--live shows a page; leave out --out"] * (self.live and self.out is not None)


DEFAULTS = [ReportFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    named, given = flags.parse(ReportFlags(), argv, prog, "RUN ...")
    run_dirs = [files.path(name) for name in named]
    # Slow libraries are not needed to print the help.
    from gptjax.viz import page, picture, report

    if given.live:
        from gptjax.viz import live

        live.serve(run_dirs, given.port)
        return
    out = files.path(given.out) if given.out else run_dirs[0] / "report.html"
    out = out if out.suffix else out.with_name(f"{out.name}.html")
    if out.suffix.lower() in (".html", ".htm"):
        page.write(out, report.to_html(report.gather(run_dirs)))
    else:
        picture.draw(run_dirs, out)
    print(f"wrote {out}")
