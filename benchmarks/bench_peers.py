# SPDX-License-Identifier: Apache-2.0
"""Time other people's detectors as they are and with ours inside, after checking
that both compute the same.

A training step is the losses of a batch and their gradients, through the whole
network; the optimizer, which is nobody's part, is left out. An inference call
ends with the boxes of every image. "Of it" is the part that ours can serve,
timed by itself on the same maps: assignment and losses with the maps'
gradients, or decoding and suppression. What is the same in both, the
convolutions, is most of the rest on a CPU.

Images are noise, boxes drawn with COCO's statistics, weights as built, but the
class logits of a trained head's mean and deviation. Score threshold 0.05, IoU
0.6, 100 boxes an image. With ours and without take turns; milliseconds are
medians, MB the peak of what a turn allocates.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# libkineto, by which memory is counted, would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from torch import Tensor

import report
import stamp
from bench_losses import size
from detectors import PEERS, Batch, Detector, Peer
from harness import Bench, Case, Clock, Machine, Result, Run, relative

AS_IS, OURS = "unpatched", "patched"
# ‖ours − theirs‖ / ‖theirs‖ of losses and gradients: sums of up to a million terms in fp32 in another order, which
# batch norms over a few cells make larger on the way back.
TOLERANCE = 1e-3
# Share of boxes: one that overlaps a better by nearly the threshold is decided by the last bit.
DECISIONS = 0.02
HEADER = f"{'':<24}{AS_IS:>10}{OURS:>8}{'p20–p80':>12}  {'':<12}{'MB':>4} {'→ MB':>5}"


class Turn(Run):
    """A computation of a detector, with ours inside or without."""

    def __init__(self, detector: Detector, case: Case, patched: bool) -> None:
        super().__init__(case, case.ours, "auto", case.inputs)
        self.detector, self.put = detector, detector.patch if patched else detector.unpatch

    def prepare(self) -> None:
        self.put()
        if self.inputs:
            super().prepare()
            return
        self.leaves = [p for p in self.detector.model.parameters() if p.requires_grad]
        self.results, self.gradients = None, ()


def parts(detector: Detector) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], bool]]:
    """Each computation with its inputs, and whether it wants gradients: of its maps, or of the model's weights."""
    yield "training step", detector.train, {}, True
    yield "  of it losses", detector.loss, {"given": detector.maps}, True
    yield "inference call", detector.detect, {}, False
    yield "  of it boxes from maps", detector.read, {"given": detector.test_maps}, False


def unlike(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Share of the boxes that only one side has, of `(boxes, scores, labels)` of each image one after another."""
    alone = total = 0
    for start in range(0, len(want), 3):
        sides = (side[start : start + 3] for side in (got, want))
        mine, theirs = (torch.cat([b.float(), s.float()[:, None], c.float()[:, None]], 1) for b, s, c in sides)
        # A tenth of a pixel, or of a score, which is far less than what distinguishes two boxes that both stay.
        same = (mine[:, None] - theirs).abs().amax(-1) < 0.1
        alone += int((~same.any(0)).sum()) + int((~same.any(1)).sum())
        total += len(mine) + len(theirs)
    return alone / max(total, 1)


def measure(bench: Bench, peer: Peer, detector: Detector, count: int) -> list[Result]:
    """Check and time the computations of a detector; with ours inside second."""
    results = []
    for name, call, inputs, trains in parts(detector):
        case = Case("", name, "", inputs, call, gradients=tuple(inputs or ["weights"]) if trains else ())
        runs, found = {}, {}
        for provider in (AS_IS, OURS):
            result = Result(peer.name, name, "", count, "fp32", provider)
            results.append(result)
            if bench.clock.used > 1.0:
                result.status, result.reason = "skipped", "no time left (--limit)"
                continue
            run = Turn(detector, case, provider == OURS)
            try:
                got, gradients = run.once()
            except Exception as error:
                said = str(error).strip().splitlines()
                result.status, result.reason = "failed", f"{type(error).__name__}: {said[0][:200] if said else ''}"
                continue
            found[provider] = got, gradients
            if provider == OURS and AS_IS in found:
                (want, want_gradients), allowed = found[AS_IS], TOLERANCE if trains else DECISIONS
                result.error = relative(got + gradients, want + want_gradients) if trains else unlike(got, want)
                if not result.error <= allowed:
                    result.status = "wrong"
                    result.reason = f"differs by {result.error:.1e} from theirs, {allowed:.0e} is allowed"
                    continue
            runs[provider] = run, result
        bench.time(runs)
    detector.unpatch()
    return results


def table(results: Sequence[Result]) -> str:
    """A title a detector, a line a computation; memory without ours and with."""
    lines: list[str] = []
    for group in report.cases(results):
        by = {r.provider: r for r in group}
        theirs, ours = by.get(AS_IS, group[0]), by.get(OURS, group[0])
        if f"{ours.stem}" not in lines:
            lines.append(ours.stem)
        bad = next((r for r in (theirs, ours) if r.total is None), None)
        if bad is not None:
            said = f"  {ours.name:<23} {bad.provider} {bad.status.upper()}: {bad.reason}"
            lines += textwrap.wrap(said, report.WIDTH, subsequent_indent=" " * 6, drop_whitespace=True)
            continue
        assert theirs.total is not None and ours.total is not None
        line = f"  {ours.name:<23}{report.ms(theirs.total.median):>9}{report.ms(ours.total.median):>8}"
        line += f"{report.ms(ours.total.p20) + '–' + report.ms(ours.total.p80):>12}"
        line += f"  {report.verdict(theirs.total.median / ours.total.median):<12}"
        line += "".join(f"{whole(r.memory):>{wide}}" for r, wide in ((theirs, 4), (ours, 6)))
        lines.append(line)
    return "\n".join(lines)


def whole(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}" if value > 1e7 else f"{value / 1e6:.1f}"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="P", help=f"of {', '.join(PEERS)}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use a GPU, else cpu")
    add("--batch", type=int, default=2, metavar="N", help="images (default %(default)s)")
    add("--size", type=size, default=(256, 256), metavar="HxW", help="of an image, in 32s (default 256x256)")
    add("--out", type=Path, default=Path("out/bench_peers"), help="folder for the JSON (default %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    add("--rounds", type=int, default=30, help="turns at most, with ours and without (default %(default)s)")
    add("--seconds", type=float, default=8.0, help="aimed at a computation (default %(default)s)")
    add("--limit", type=float, default=500.0, metavar="S", help="seconds for everything; then it stops (default 500)")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    given = parser.parse_args(words)
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return given


def run(given: argparse.Namespace) -> tuple[list[Result], Machine]:
    machine = Machine(given.device, given.clock == "cpu")
    # Steps of seconds are what is wanted here.
    bench = Bench(machine, Clock(given.limit), given.rounds, given.seconds, slow=60.0)
    for said in (*stamp.lines(stamp.stamp()), f"{given.batch} images of {given.size[0]}×{given.size[1]}, fp32"):
        print("\n".join(textwrap.wrap(said, report.WIDTH)))
    print(f"\n{HEADER}\n{'=' * len(HEADER)}", flush=True)
    results: list[Result] = []
    for peer in (PEERS[name] for name in given.peers):
        if missing := peer.missing():
            why = f"not installed: {', '.join(missing)} (tests/support/peers/requirements.txt)"
            results.append(Result(peer.name, "all", "", given.batch, "fp32", AS_IS, "skipped", why))
            print(f"{peer.name}\n  {why}", flush=True)
            continue
        torch.manual_seed(given.seed)
        detector = peer.build(Batch.draw(given.batch, given.size, given.seed, given.device))
        got = measure(bench, peer, detector, given.batch)
        results += got
        print(table(got), flush=True)
        for note in detector.notes:
            print("\n".join(textwrap.wrap(note, report.WIDTH - 2, initial_indent="  ", subsequent_indent="  ")))
    return results, machine


def main() -> int:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    results, machine = run(given)
    print("\n" + "\n".join(textwrap.wrap(report.quiet(machine), report.WIDTH)))
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings["threads"] = torch.get_num_threads()
    report.write_json(given.out / "bench_peers.json", results, machine, settings)
    print(f"\nwritten: {given.out / 'bench_peers.json'}")
    return 1 if any(r.status in ("wrong", "failed") for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
