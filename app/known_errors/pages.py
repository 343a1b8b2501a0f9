"""The table of known errors as Markdown: docs/errors, written by `python -m app.known_errors docs/errors`."""

from app.known_errors.catalog import LAYERS, KnownError, all_errors, title

WRITTEN = "<!-- Written by `python -m app.known_errors docs/errors` from app/known_errors/layers. -->"
MATCHED = """\
Texts are matched word for word; numbers, addresses and paths in the samples are examples. Under each entry stands where
its text comes from: "seen" means that we made that version print it; most entries about NCCL and InfiniBand come from
source code, binaries and public reports, not from hardware of ours."""
HOW = "`entrypoint.py diagnose FILE` finds them in any log, and `diagnose -` in a pasted line."


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    return {"README.md": _contents(), **{f"{layer}.md": _page(layer) for layer in LAYERS}}


def _contents() -> str:
    parts = ["# Known errors", WRITTEN, HOW, MATCHED]
    for layer in LAYERS:
        parts += [f"## [{title(layer)}]({layer}.md)", _links(layer, f"{layer}.md")]
    return "\n\n".join(parts) + "\n"


def _page(layer: str) -> str:
    parts = [f"# {title(layer)}", WRITTEN, f"[All known errors](README.md). {HOW}", _links(layer)]
    return "\n\n".join([*parts, *(_entry(error) for error in _of(layer))]) + "\n"


def _of(layer: str) -> list[KnownError]:
    return [error for error in all_errors() if error.layer == layer]


def _links(layer: str, page: str = "") -> str:
    return " · ".join(f"[{error.id}]({page}#{error.id})" for error in _of(layer))


def _entry(error: KnownError) -> str:
    sample = error.sample.strip("\n")
    return (
        f"## {error.id}\n\n```text\n{sample}\n```\n\n{error.cause}\n\n"
        f"**Fix.** {error.fix}\n\n<sub>Text: {error.source}.</sub>"
    )
