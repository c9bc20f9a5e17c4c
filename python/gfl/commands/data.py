# SPDX-License-Identifier: Apache-2.0
"""``gfl data``: what a data set holds and what is wrong with it; parts of it, and several as one."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..files import say

if TYPE_CHECKING:
    from ..data.coco import Annotations
    from ..data.problems import Problems

    Parts = dict[str, tuple[Annotations, Path]]

HELP = "look at data sets of any known format; split, filter, merge them"
EPILOG = """\
  gfl data photos                      # a table, problems, a sheet of pictures
  gfl data photos --split 0.8,0.2 --out set
  gfl data one two.json --classes cat,dog --out set --copy
  gfl train --data set …"""
SHEET = "data_sheet.jpg"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl data SOURCE [SOURCE …] [option …]"
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "sources", nargs="+", metavar="SOURCE", help="folder, data.yaml or annotation file; several are merged by class"
    )
    add("--sheet", default=SHEET, metavar="FILE", help=f"picture of images with their boxes ('': none) [{SHEET}]")
    add("--classes", metavar="NAME,…", help="only these classes")
    add("--split", metavar="X,X[,X]", help="new parts train, val and test: shares of all images")
    add("--seed", type=int, default=0, metavar="N", help="random seed of --split [0]")
    add("--boxes", choices=("corners", "shares"), help="what COCO's boxes are, if not x, y, width, height in pixels")
    add("--out", type=Path, metavar="DIR", help="write the result in COCO format to this new folder")
    add("--copy", action="store_true", help="copy the images to --out too; else they stay where they are")


def run(options: argparse.Namespace) -> int:
    from ..data import report
    from ..data.problems import Problems

    if options.copy and options.out is None:
        raise ValueError("`--copy` needs --out DIR")
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"`--out` {options.out} is there already and not empty: choose another folder")
    if options.sheet:
        # Its own name is no input, also in the folder that is looked at.
        inputs = [] if Path(options.sheet).name == SHEET else options.sources
        files.check_output(options.sheet, "--sheet", inputs, Path(options.sheet).suffix)
    parts = _parts(options)
    for line in report.class_table(parts):
        say(line)
    say("")
    for line in report.size_lines(parts):
        say("\n".join(textwrap.wrap(line, report.WIDTH - 1)))
    problems = Problems()
    for part, (a, images) in parts.items():
        problems.add(_problems(part, a, images))
    pairs = list(report.duplicates(parts, problems))
    across = [pair for pair in pairs if pair[0].rpartition(" ")[2] != pair[1].rpartition(" ")[2]]
    for what, found in (("of two parts", across), ("of one part", [pair for pair in pairs if pair not in across])):
        problems.note(f"pairs of images {what} look the same", " = ".join(found[0]) if found else "", len(found))
    say("problems:" if problems else "no problems")
    for line in report.wrapped(problems.lines()):
        say(line)
    if options.sheet:
        with files.replacing(options.sheet) as file:
            report.sheet(parts).save(file)
        say(f"pictures: {options.sheet}")
    if options.out is not None:
        _write(parts, options.out, options.copy)
    return 0


def _parts(options: argparse.Namespace) -> Parts:
    from ..data import layouts, subsets

    gathered: dict[str, list[tuple[Annotations, Path]]] = {}
    for source in options.sources:
        found, root, kind = layouts.read(source)
        count = ", ".join(f"{part} {len(a.image_ids)}" for part, a in found.items())
        say("\n".join(textwrap.wrap(f"{source}: {kind}; images: {count}", 79, subsequent_indent="  ")))
        for part, a in found.items():
            converted = subsets.converted(a, options.boxes) if options.boxes else a
            gathered.setdefault(part, []).append((converted, root))
    say("")
    several = len(options.sources) > 1
    names = [name for found in gathered.values() for a, _ in found for name in a.distinct_names()]
    parts: Parts = {}
    for part in sorted(gathered, key=("train", "val", "test").index):
        those = gathered[part]
        root = those[0][1]
        parts[part] = subsets.merged(those, root, dict.fromkeys(names)) if several else those[0][0], root
    boxed = {name for a, _ in parts.values() for name, n in zip(a.classes, subsets.class_counts(a)) if n}
    for number, (part, (a, root)) in enumerate(parts.items()):
        # The same in all parts, and said of the first.
        parts[part] = subsets.without_ghosts(a, boxed, said=number == 0), root
    if options.classes:
        wanted = [name.strip() for name in options.classes.split(",") if name.strip()]
        parts = {part: (subsets.of_classes(a, wanted), root) for part, (a, root) in parts.items()}
    if options.split:
        shares: list[float] = []
        with suppress(ValueError):
            shares = [float(share) for share in options.split.split(",")]
        if not 2 <= len(shares) <= 3:
            raise ValueError(f"`--split` must be two or three shares, as 0.8,0.2, got {options.split!r}")
        root = next(iter(parts.values()))[1]
        whole = next(iter(parts.values()))[0] if len(parts) == 1 else subsets.merged(list(parts.values()), root)
        parts = dict(zip(("train", "val", "test"), ((a, root) for a in subsets.hold_out(whole, shares, options.seed))))
    return parts


def _problems(part: str, annotations: Annotations, images: Path) -> Problems:
    """What reading found, and what a training would leave out."""
    from ..data.coco import CocoDataset
    from ..data.subsets import class_counts, names_of

    problems = CocoDataset(annotations, images).problems if annotations.image_ids else annotations.problems
    without = [label for label, count in enumerate(class_counts(annotations)) if not count]
    problems.note(f"classes without a box in {part}: {names_of(annotations, without)}", "", len(without))
    return problems


def _write(parts: Parts, out: Path, copy: bool) -> None:
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for part, (a, images) in parts.items():
        names = [os.path.relpath(images / name, out) for name in a.file_names]
        if copy:
            (out / "images" / part).mkdir(parents=True, exist_ok=True)
            taken: set[str] = set()
            for place, name in enumerate(a.file_names):
                base = Path(name).name
                # Two folders may have an image of one name.
                new = base if base not in taken else f"{place:06}_{base}"
                taken.add(new)
                shutil.copyfile(images / name, out / "images" / part / new)
                names[place] = f"images/{part}/{new}"
        content = replace(a, file_names=names).to_coco()
        for entry, ignored in zip(content["annotations"], a.ignored.tolist()):
            entry |= {"ignore": 1} if ignored else {}
        path = out / "annotations" / f"instances_{part}.json"
        files.write_json(path, content)
        say(f"written: {path}, {len(names)} images, {len(a.boxes)} boxes")
