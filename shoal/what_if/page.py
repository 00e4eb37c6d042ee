"""A study as one HTML page. It must not know where its numbers come from, nor how a page is made."""

from __future__ import annotations

from shoal.jobs.units import count
from shoal.show.page import caption, legend, paragraphs, section, table, tiles, whole
from shoal.show.pictures import curves, histogram
from shoal.what_if.study import Run, Study
from shoal.what_if.words import capacity_words, remarks, rows, seconds, spread_words


def page(found: Study) -> str:
    """The whole page, well-formed as XML too."""
    first = next(iter(found.runs.values()))[0]
    seeds = len(next(iter(found.runs.values())))
    below = f"{found.machine}, {count(found.positions)} tokens of memory; simulated with the scheduler that serves"
    many = f"Means of {seeds} seeds, with the half of their 95 % intervals." if seeds > 1 else ""
    return whole(
        f"What if: {found.name}",
        below,
        [
            tiles(_tiles(found, first)),
            section("Policies on the same requests", table(("", *found.runs, ""), [(*row, "") for row in rows(found)]),
                    paragraphs([many] if many else [], soft=True), paragraphs(remarks(found))),
            section("Requests a second that keep the gap", _capacities(found)),
            section("While it ran", *(_course(found, runs[0]) for runs in found.runs.values())),
            section("Times", *(_times(runs[0]) for runs in found.runs.values())),
        ],
    )  # fmt: skip


def _tiles(found: Study, run: Run) -> list[tuple[str, str, str]]:
    summary = run.summary
    return [
        ("Requests", count(summary.requests), f"{count(summary.prompt)} prompt tokens"),
        ("Answer tokens", count(summary.tokens), f"{count(summary.tokens_per_second)} a second ({run.policy})"),
        ("Simulated", seconds(summary.seconds), f"{count(run.steps)} steps"),
        ("First token", seconds(summary.ttft.p50), f"99 % within {seconds(summary.ttft.p99)}"),
        ("Between tokens", seconds(summary.tbt.p50), f"99 % within {seconds(summary.tbt.p99)}"),
    ]


def _capacities(found: Study) -> str:
    if not found.capacities:
        return ""
    bars = [(policy, sum(one.rate for one in rates) / len(rates)) for policy, rates in found.capacities.items()]
    words = [f"{policy}: {capacity_words(rates)}" for policy, rates in found.capacities.items()]
    tenths = [(policy, 100 * rate) for policy, rate in bars]  # a picture has whole numbers: of a hundred seconds
    return histogram(tenths, "Requests in a hundred seconds") + paragraphs(words, soft=True)


def _course(found: Study, run: Run) -> str:
    """Tokens a second, and requests under way, on scales that all policies share."""
    first = [runs[0] for runs in found.runs.values()]
    tokens = max(max(each.course.tokens, default=0.0) for each in first)
    requests = max(max(each.course.requests, default=0.0) for each in first)
    end = seconds(run.course.width * len(run.course.tokens))
    return (
        caption(run.policy, spread_words(run.summary.ttft).replace("median", "first token: median"))
        + curves([("decode", run.course.tokens)], tokens, (f"{count(tokens)} tokens/s", "0 s", end),
                 f"{run.policy}: tokens a second", 70)
        + curves([("rows", run.course.requests)], requests, (f"{count(requests)} requests under way", "0 s", end),
                 f"{run.policy}: requests under way", 70)
        + legend([("decode", "answer tokens"), ("rows", "requests that had come and not ended")])
    )  # fmt: skip


def _times(run: Run) -> str:
    named = (
        ("to the first token (TTFT)", run.summary.ttft), ("between tokens (TBT)", run.summary.tbt),
        ("a token after the first (TPOT)", run.summary.tpot), ("longest of an answer's gaps", run.summary.worst_gap),
        ("end to end", run.summary.e2e), ("until it ran", run.summary.delay),
    )  # fmt: skip
    cells = [
        (name, seconds(s.mean), seconds(s.p50), seconds(s.p90), seconds(s.p99), seconds(s.most), "")
        for name, s in named
    ]
    return caption(run.policy, "seed " + str(run.seed)) + table(
        ("", "mean", "median", "90 %", "99 %", "longest", ""), cells
    )
