# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: pages that are made of something else, and links between them.

The start page is the README, "Every option" is the parser of the command line, "Examples" the files of examples/.
Links to files that are no page become the files' names.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files outside the folder of documents, by the page that they are.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: Any) -> Files:
    made = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    made |= {"options.md": options(), "examples.md": examples()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = next((Path(name) for name, made in PAGES.items() if made == page.file.src_uri), None)
    folder = Path("docs", page.file.src_uri).parent if here is None else here.parent

    def link(found: re.Match[str]) -> str:
        bang, text, target, anchor = (group or "" for group in found.groups())
        if not target or re.match(r"\w+:", target):
            return found[0]
        path = os.path.normpath(folder / target)
        if path.startswith("docs" + os.sep):
            to = path.partition(os.sep)[2]
        elif path in PAGES:
            to = PAGES[path]
        elif path.startswith("examples" + os.sep):
            to, anchor = "examples.md", f"#{Path(path).stem}"
        else:
            return text
        depth = page.file.src_uri.count("/")
        return f"{bang}[{text}]({'../' * depth}{to}{anchor})"

    return re.sub(r"(!?)\[([^\]\n]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, markdown)


def examples() -> str:
    """Every file of examples/, whole, under its name."""
    parts = ["# Examples\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8").partition("\n")[2]  # without the licence
        parts.append(f"## {path.name} {{ #{path.stem} }}\n\n```python\n{code}```\n")
    return "\n".join(parts)


def options() -> str:
    """The help of every command, as tables."""
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    from gfl import cli

    whole = cli.parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Every option\n", "`gfl COMMAND --help` says the same in a terminal.\n"]
    for name, parser in commands.choices.items():
        # Without the width of a terminal, and of this one alone.
        usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ").replace("\n       gfl", "\0gfl"))
        usage = usage.replace("\0", "\n").strip()
        parts += [f"## gfl {name}\n", f"{parser.description}\n", f"```\n{usage}\n```\n"]
        for group in parser._action_groups:
            shown = [action for action in group._group_actions if action.help not in (None, argparse.SUPPRESS)]
            shown = [action for action in shown if action.dest != "help"]
            if shown:
                title = group.title if group.title not in ("positional arguments", "options") else ""
                parts += [f"### {title} of gfl {name}\n"] if title else []
                parts += [f"{group.description}\n"] if group.description else []
                parts += ["| option | meaning |", "|---|---|", *map(row, shown), ""]
        if parser.epilog:
            parts.append(f"```\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def row(action: argparse.Action) -> str:
    values = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    if isinstance(values, tuple):
        values = " ".join(values)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        values = ""
    elif not values and action.option_strings:
        values = action.dest.upper()
    words = f"{', '.join(action.option_strings)} {values}".strip() or action.dest
    text = (action.help or "") % vars(action)
    return f"| <code>{html.escape(words).replace('|', '&#124;')}</code> | {text.replace('|', '&#124;')} |"
