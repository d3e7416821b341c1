"""A plugin of mkdocs: pages that are made of other files when the site is built, so that nothing is told twice.

The command line from the parsers' help, the changelog, the layouts of files from BUILD.md, all results of benchmarks,
and the notebooks with their outputs, which are not run.
"""

import base64
import contextlib
import inspect
import io
import json
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPOSITORY = "https://github.com/ifjax/ifjax/blob/main"


def on_files(files, config):
    """Add the pages that are made."""
    build = (ROOT / "BUILD.md").read_text("utf-8")
    layouts = (section(build, title) for title in ("Checkpoint layout", "Exchange with other tools"))
    made = {
        "cli.md": command_line(),
        "changelog.md": from_root((ROOT / "CHANGELOG.md").read_text("utf-8")),
        "spec/layout.md": "# Layouts of files\n\n" + from_root("\n".join(layouts), up="../"),
    }
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".md", ".png"):
            made[f"results/{path.relative_to(RESULTS).as_posix()}"] = path.read_bytes()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, pictures = notebook(path)
        made |= {f"notebooks/{path.stem}.md": page} | pictures
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Name what is called as users call it, and lead links that leave the site to files of the repository."""
    markdown = re.sub(r"^::: (ifjax\.\w+)$(\n    options:$)?", as_called, markdown, flags=re.MULTILINE)
    up = page.file.src_uri.count("/") + 1
    root = "../" * up
    markdown = markdown.replace(f"]({root}benchmarks/results/", f"]({root.removeprefix('../')}results/")
    return re.sub(rf"\]\((?:\.\./){{{up}}}(?!\.)", f"]({REPOSITORY}/", markdown)


def as_called(line: re.Match[str]) -> str:
    """What is shown for `::: ifjax.quantize`: the function. By that name the parser finds the file it stands in."""
    import ifjax

    public = line[1].removeprefix("ifjax.")
    named = getattr(ifjax, public)
    if inspect.ismodule(named):
        return line[0]
    path = f"{named.__module__}.{named.__qualname__}"
    return f"::: {path}\n    options:\n      heading: {line[1]}\n      toc_label: {public}"


def section(text: str, title: str) -> str:
    """A chapter of BUILD.md, its heading included."""
    return re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]


def from_root(text: str, up: str = "") -> str:
    """A text of the repository's root, with its links as a page of the site needs them."""
    return re.sub(r"\]\((docs/)?(?!https?:|#)", lambda link: f"]({up if link[1] else f'{REPOSITORY}/'}", text)


def command_line() -> str:
    """The help of every command."""
    listed = help_of()
    listing = listed.split("commands:")[1].split("where to begin")[0]
    commands = re.findall(r"^    ([a-z]+)(?: |$)", listing, re.MULTILINE)
    parts = ["# Command line\n\nWhat `ifjax --help` and `ifjax COMMAND --help` print.\n"]
    parts += [f"## ifjax {command}\n\n```text\n{help_of(command)}```\n" for command in commands]
    return "\n".join([parts[0], f"```text\n{listed}```\n", *parts[1:]])


def help_of(*command: str) -> str:
    """What --help prints, 88 columns wide."""
    from ifjax import cli

    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "88"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return out.getvalue()


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and its pictures by path."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"!\[([^]]*)\]\(https://[^)]*\)", r"\1", source)  # nothing is fetched from elsewhere
            parts.append(re.sub(r"`(\d\d_\w+)`", r"[\1](\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", [])))
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{heading(parts)}]({name})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def heading(parts: list[str]) -> str:
    """The last heading, which says what a picture is about."""
    found = [line.lstrip("# ") for part in parts if part.startswith("#") for line in part.splitlines()[:1]]
    return found[-1] if found else ""
