# SPDX-License-Identifier: Apache-2.0
"""Time other people's detectors unpatched and patched with our operators, after
checking that both compute the same.

A training step is the losses of a batch and their gradients, through the whole
network, without the optimizer. An inference call ends with the boxes of every
image. "Of it" is the part that our operators replace, timed by itself on the same
maps: assignment and losses with the maps' gradients, or decoding and suppression.
The convolutions, the same in both, are most of the rest on a CPU.

Images are noise, boxes random with COCO's statistics, weights as initialised, but
class logits have a trained head's mean and deviation. Score threshold 0.05, IoU
0.6, 100 boxes per image. Patched and unpatched take turns; milliseconds are
medians, MB the peak of what a turn allocates.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import report
from clock import Budget, Machine
from harness import Bench, Case, Result, Run, relative
from peer_detectors import PEERS, Batch, Detector, Peer

AS_IS, OURS = "unpatched", "patched"
# ‖ours − theirs‖ / ‖theirs‖ of losses and gradients: fp32 sums of up to a million terms in another order, whose error
# batch norms over a few cells amplify on the way back.
TOLERANCE = 1e-3
# Share of boxes: the last bit decides about one that overlaps a better box by nearly the threshold.
DECISIONS = 0.02
HEADER = f"{'':<24}{AS_IS:>10}{OURS:>8}{'p20–p80':>12}  {'':<12}{'MB':>4} {'→ MB':>5}"


class Turn(Run):
    """One computation of a detector, patched or not."""

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


# Name, call, inputs, and whether it has gradients.
Part = tuple[str, Callable[..., Any], dict[str, Any], bool]


def parts(detector: Detector) -> Iterator[Part]:
    """Each computation with its inputs, and whether it needs gradients: of its maps, or of the model's weights."""
    yield "training step", detector.train, {}, True
    yield "  of it losses", detector.loss, {"given": detector.maps}, True
    yield "inference call", detector.detect, {}, False
    yield "  of it boxes from maps", detector.read, {"given": detector.test_maps}, False


def unlike(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Share of the boxes that only one side has, of `(boxes, scores, labels)` of each image in turn."""
    alone = total = 0
    for start in range(0, len(want), 3):
        sides = (side[start : start + 3] for side in (got, want))
        mine, theirs = (torch.cat([b.float(), s.float()[:, None], c.float()[:, None]], 1) for b, s, c in sides)
        # A tenth of a pixel, or of a score, which is far less than what distinguishes two boxes that both stay.
        same = (mine[:, None] - theirs).abs().amax(-1) < 0.1
        alone += int((~same.any(0)).sum()) + int((~same.any(1)).sum())
        total += len(mine) + len(theirs)
    return alone / max(total, 1)


def measure(
    bench: Bench, peer: Peer, detector: Detector, count: int, computations: Iterable[Part] | None = None
) -> list[Result]:
    """Check and time the computations of a detector, all by default, unpatched and patched."""
    results = []
    for name, call, inputs, trains in computations or parts(detector):
        case = Case("", name, "", inputs, call, gradients=tuple(inputs or ["weights"]) if trains else ())
        runs, found = {}, {}
        for provider in (AS_IS, OURS):
            result = Result(peer.name, name, "", count, "fp32", provider)
            results.append(result)
            if bench.budget.used > 1.0:
                result.status, result.reason = "skipped", "no time left (--limit)"
                continue
            run = Turn(detector, case, provider == OURS)
            outcome = bench.first(run, result)
            if outcome is None:
                continue
            found[provider] = got, gradients = outcome
            if provider == OURS and AS_IS in found:
                (want, want_gradients), allowed = found[AS_IS], TOLERANCE if trains else DECISIONS
                error = relative(got + gradients, want + want_gradients) if trains else unlike(got, want)
                if not result.check(error, allowed, "theirs"):
                    continue
            runs[provider] = run, result
        bench.time(runs)
    detector.unpatch()
    return results


def table(results: Sequence[Result]) -> str:
    """A title per detector, a line per computation; memory unpatched and patched."""
    lines: list[str] = []
    for group in report.cases(results):
        by = {r.provider: r for r in group}
        theirs, ours = by.get(AS_IS, group[0]), by.get(OURS, group[0])
        if f"{ours.stem}" not in lines:
            lines.append(ours.stem)
        bad = next((r for r in (theirs, ours) if r.total is None), None)
        if bad is not None:
            text = f"  {ours.name:<23} {bad.provider} {bad.status.upper()}: {bad.reason}"
            lines += textwrap.wrap(text, report.WIDTH, subsequent_indent=" " * 6, drop_whitespace=True)
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


def configure(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PEERS)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="P", help=f"of {names}")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (default %(default)s)")
    parser.set_defaults(size=(256, 256), seconds=8.0, limit=500.0)


def measure_all(given: argparse.Namespace) -> tuple[list[Result], Machine]:
    machine = Machine(given.device, given.clock == "cpu")
    # Steps that take seconds are not too slow here.
    bench = Bench(machine, Budget(given.limit), given.rounds, given.seconds, slow=60.0)
    print(report.stamped(f"{given.batch} images of {given.size[0]}×{given.size[1]}, fp32"))
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


def run(given: argparse.Namespace) -> int:
    results, machine = measure_all(given)
    print("\n" + report.steadiness(machine))
    report.finish(given, results, machine)
    return 1 if any(r.status in ("wrong", "failed") for r in results) else 0
