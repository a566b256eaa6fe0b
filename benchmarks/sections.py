"""What benchmarks give: a :class:`Section` of rows, and how each kind of section reads as a table.

In: rows (plain dictionaries; bytes and seconds). Out: heads, cells, Markdown. What it does not
know: how anything was measured, HTML, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.units import MiB

Row = dict[str, Any]
Progress = Callable[[str], None]
Steps = Callable[[int, int], None]  # (done, total)
Show = Callable[[Row, str], str]  # (row, field) → the cell's words
ABSENT = "–"


def silent(text: str) -> None:
    """The progress of whoever does not want any."""


def no_steps(done: int, total: int) -> None:
    """The steps of whoever does not want to see any."""


def counted(progress: Progress) -> Steps:
    """Steps told as text, each when it begins."""
    return lambda done, total: progress(f"run {done + 1} of {total}")


# --- words for cells: (row, field) → text ---


def text(row: Row, field: str) -> str:
    return str(row.get(field, ABSENT))


def mib(row: Row, field: str) -> str:
    return in_mib(row.get(field))


def number(digits: int) -> Show:
    def show(row: Row, field: str) -> str:
        value = row.get(field)
        return ABSENT if value is None else f"{value:.{digits}f}"

    return show


def measured(digits: int) -> Show:
    """A median and half its range: ``40.9 ± 3%``."""

    def show(row: Row, field: str) -> str:
        value = row.get(field)
        if value is None:
            return ABSENT
        return f"{value:.{digits}f} ± {row.get(f'{field}_spread', 0.0):.0%}"

    return show


def share(row: Row, field: str) -> str:
    value = row.get(field)
    return ABSENT if value is None else f"{value:.0%}"


def difference(row: Row, field: str) -> str:
    return signed(row.get(field))


def scientific(row: Row, field: str) -> str:
    value = row.get(field)
    return ABSENT if value is None else f"{value:.1e}"


def in_mib(n_bytes: float | None) -> str:
    return ABSENT if n_bytes is None else f"{n_bytes / MiB:.0f}"


def signed(part: float | None) -> str:
    return ABSENT if part is None else f"{part:+.1%}"


def plan_in_words(row: Row, field: str) -> str:
    verdict = "fits" if row["fits"] else "does not fit"
    return f"{verdict} ({row['conceded']})" if row["conceded"] else verdict


def what_was_said(row: Row, field: str) -> str:
    if row["mode"] == "text":
        return f"32 tokens behind {row['amount']:g}"
    parts = [f"{row['amount']:g} s of speech"]
    if row["mode"] == "speech, encoded after its end":
        parts.append("encoded after its end")
    if row["padding"]:
        parts.append("padded to 188 rows")
    return ", ".join(parts)


# --- kinds ---


@dataclass(frozen=True)
class Column:
    head: str
    field: str
    show: Show = text


@dataclass(frozen=True)
class Kind:
    """How one kind of section reads. ``key``: the fields that name a row. ``better``: field → +1
    when more is better, −1 when less is.
    """

    title: str
    key: tuple[str, ...]
    better: dict[str, int]
    columns: tuple[Column, ...]


SPEED_COLUMNS = (
    Column("prefill tok/s", "prefill_tok_s", measured(1)),
    Column("decode tok/s", "decode_tok_s", measured(1)),
)

KINDS: dict[str, Kind] = {
    "memory": Kind(
        title="Memory by device",
        key=("model", "device"),
        better={"peak_pss_bytes": -1, "planned_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("device", "device"),
            Column("to spend MiB", "usable_bytes", mib),
            Column("plan", "fits", plan_in_words),
            Column("n_ctx", "n_ctx"),
            Column("board's peak planned MiB", "planned_bytes", mib),
            Column("planned for this CPU", "here_planned_bytes", mib),
            Column("measured PSS", "peak_pss_bytes", mib),
            Column("plan is off by", "error", difference),
            Column("run under that limit", "outcome"),
        ),
    ),
    "plan": Kind(
        title="Planned against measured peak, from the end of load to exit",
        key=("model", "n_ctx"),
        better={"peak_pss_bytes": -1, "planned_peak_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("n_ctx", "n_ctx"),
            Column("planned MiB", "planned_peak_bytes", mib),
            Column("measured PSS MiB", "peak_pss_bytes", mib),
            Column("plan is off by", "error", difference),
            Column("planned anonymous", "planned_anon_bytes", mib),
            Column("measured anonymous", "anon_bytes", mib),
        ),
    ),
    "capped": Kind(
        title="Under a hard memory limit, from a cold cache",
        key=("model", "limit_bytes"),
        better={"decode_tok_s": 1, "ttft_s": -1, "max_usage_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("limit", "limit"),
            Column("outcome", "outcome"),
            Column("TTFT s", "ttft_s", number(2)),
            Column("decode tok/s", "decode_tok_s", measured(2)),
            Column("peak RSS MiB", "peak_rss_bytes", mib),
            Column("group's peak MiB", "max_usage_bytes", mib),
            Column("major faults", "major_faults"),
            Column("OOM kills", "oom_kills"),
        ),
    ),
    "base": Kind(
        title="What runs before any weight is loaded (cumulative)",
        key=("loaded",),
        better={"anon_bytes": -1},
        columns=(
            Column("loaded", "loaded"),
            Column("anonymous MiB", "anon_bytes", mib),
            Column("file-backed MiB", "file_bytes", mib),
        ),
    ),
    "speed": Kind(
        title="Speed",
        key=("model", "threads", "depth"),
        better={"prefill_tok_s": 1, "decode_tok_s": 1, "ttft_s": -1},
        columns=(
            Column("model", "model"),
            Column("threads", "threads"),
            Column("prompt tokens", "depth"),
            *SPEED_COLUMNS,
            Column("of the roof", "roof_share", share),
            Column("TTFT s", "ttft_s", number(2)),
            Column("load cold s", "load_cold_s", number(2)),
            Column("load warm s", "load_s", number(2)),
        ),
    ),
    "start": Kind(
        title="Until an answer starts, and tokens in a pass",
        key=("model", "threads", "depth"),
        better={"cold_s": -1, "memory_s": -1, "disk_s": -1, "tokens_per_pass": 1},
        columns=(
            Column("model", "model"),
            Column("threads", "threads"),
            Column("kept tokens", "depth"),
            Column("first token, prefilled s", "cold_s", measured(3)),
            Column("kept in memory s", "memory_s", measured(3)),
            Column("kept on disk s", "disk_s", measured(3)),
            Column("tokens per pass, quoting", "tokens_per_pass", number(2)),
            Column("forced share of a call", "forced_share", share),
        ),
    ),
    "latency": Kind(
        title="From the end of the input to the first token",
        key=("model", "mode", "amount", "padding"),
        better={"first_token_s": -1},
        columns=(
            Column("model", "model"),
            Column("input", "mode", what_was_said),
            Column("first token s", "first_token_s", measured(3)),
            Column("of it the encoder s", "encoder_s", number(3)),
            Column("real-time factor", "rtf", number(2)),
        ),
    ),
    "quality": Kind(
        title="Quality",
        key=("model",),
        better={"ppl": -1, "kld_mean": -1},
        columns=(
            Column("model", "model"),
            Column("size MiB", "size_bytes", mib),
            Column("perplexity", "ppl", number(2)),
            Column("mean KL divergence", "kld_mean", number(4)),
            Column("99th percentile", "kld_p99", number(3)),
            Column("same first choice", "top1_agreement", share),
        ),
    ),
    "compare": Kind(
        title="Against what else there is",
        key=("system", "file"),
        better={"decode_tok_s": 1, "prefill_tok_s": 1, "peak_pss_bytes": -1},
        columns=(
            Column("system", "system"),
            Column("file", "file"),
            *SPEED_COLUMNS,
            Column("peak PSS MiB", "peak_pss_bytes", mib),
            Column("peak RSS MiB", "peak_rss_bytes", mib),
            Column("load peak RSS MiB", "load_peak_rss_bytes", mib),
            Column("load s", "load_s", number(2)),
        ),
    ),
    "ladder": Kind(
        title="What each recipe costs",
        key=("recipe",),
        better={"ppl": -1, "kld_mean": -1, "decode_tok_s": 1, "pss_bytes": -1},
        columns=(
            Column("recipe", "recipe"),
            Column("MiB", "bytes", mib),
            Column("bits/weight", "bits_per_weight", number(2)),
            Column("PPL", "ppl", number(2)),
            Column("KLD mean", "kld_mean", number(4)),
            Column("KLD 99 %", "kld_p99", number(3)),
            Column("same top-1", "top1_agreement", share),
            Column("prefill tok/s", "prefill_tok_s", number(0)),
            Column("decode tok/s", "decode_tok_s", number(0)),
            Column("peak PSS MiB", "pss_bytes", mib),
            Column("of it anonymous", "anon_bytes", mib),
        ),
    ),
    "encoder": Kind(
        title="The audio encoder alone, in steps of 480 ms",
        key=("model", "threads"),
        better={"step_s": -1, "peak_pss_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("precision", "precision"),
            Column("threads", "threads"),
            Column("real-time factor", "rtf", measured(3)),
            Column("step s", "step_s", number(4)),
            Column("95th percentile", "step_p95_s", number(4)),
            Column("tail s", "tail_s", number(4)),
            Column("load s", "load_s", number(2)),
            Column("peak PSS MiB", "peak_pss_bytes", mib),
            Column("weights MiB", "weights_bytes", mib),
        ),
    ),
    "listening": Kind(
        title="A spoken conversation: planned against measured, by phase",
        key=("model", "encoders", "phase"),
        better={"peak_pss_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("encoders", "encoders"),
            Column("phase", "phase"),
            Column("planned MiB", "planned_bytes", mib),
            Column("measured PSS MiB", "peak_pss_bytes", mib),
            Column("plan is off by", "error", difference),
        ),
    ),
    "hear first": Kind(
        title="A spoken turn where the encoder is closed before the decoder's weights are read",
        key=("model", "encoders", "limit"),
        better={"ttft_s": -1, "peak_pss_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("encoders", "encoders"),
            Column("limit", "limit"),
            Column("n_ctx", "n_ctx"),
            Column("planned MiB", "planned_bytes", mib),
            Column("measured PSS MiB", "peak_pss_bytes", mib),
            Column("plan is off by", "error", difference),
            Column("listening, planned MiB", "listen_planned_bytes", mib),
            Column("listening MiB", "listen_pss_bytes", mib),
            Column("answering MiB", "decode_pss_bytes", mib),
            Column("until it hears s", "begin_s", number(2)),
            Column("first token s", "ttft_s", number(2)),
            Column("whole turn s", "turn_s", number(1)),
            Column("read from disk MiB", "read_bytes", mib),
            Column("killed", "oom_kills"),
        ),
    ),
    "talk": Kind(
        title="From the last sample of speech to the first sample of the answer's sound",
        key=("model", "way"),
        better={"total_s": -1},
        columns=(
            Column("model", "model"),
            Column("spoken", "way"),
            Column("all s", "total_s", measured(2)),
            Column("pause s", "pause_s", number(2)),
            Column("encoder tail s", "encoder_s", number(3)),
            Column("prefill s", "prefill_s", number(3)),
            Column("first clause s", "clause_s", number(3)),
            Column("synthesis s", "synthesis_s", number(3)),
        ),
    ),
    "talk room": Kind(
        title="Its own voice in the room",
        key=("delay_s",),
        better={"per_hour": -1, "heard_ms": -1},
        columns=(
            Column("delay s", "delay_s", number(2)),
            Column("minutes of own speech", "minutes", number(0)),
            Column("false barge-ins", "false_barge_ins"),
            Column("per hour", "per_hour", number(1)),
            Column("echo left dB", "left_db", number(0)),
            Column("users", "users"),
            Column("heard after ms", "heard_ms", number(0)),
            Column("at most", "heard_most_ms", number(0)),
            Column("within 300 ms", "within_300_ms", share),
        ),
    ),
    "talk pauses": Kind(
        title="Pauses in a sentence: how soon its end is found, and how often it is cut off there",
        key=("rule",),
        better={"wait_s": -1, "words_cut": -1},
        columns=(
            Column("pause that ends it", "rule"),
            Column("spoken", "spoken"),
            Column("wait s", "wait_s", number(2)),
            Column("at most", "wait_most_s", number(2)),
            Column("words cut off", "words_cut", share),
            *(
                Column(f"cut at {pause_s} s", f"cut_{pause_s}", share)
                for pause_s in ("0.3", "0.4", "0.5", "0.6", "0.8", "1")
            ),
        ),
    ),
    "talk speakers": Kind(
        title="Speakers who always pause as long: the pause that ends an utterance is learned",
        key=("pause_s",),
        better={"learned_wait_s": -1, "learned_words_cut": -1},
        columns=(
            Column("their pauses s", "pause_s", number(1)),
            Column("spoken", "spoken"),
            Column("fixed: wait s", "fixed_wait_s", number(2)),
            Column("words cut off", "fixed_words_cut", share),
            Column("learned: wait s", "learned_wait_s", number(2)),
            Column("words cut off", "learned_words_cut", share),
        ),
    ),
    "talk loop": Kind(
        title="A conversation that goes on and on",
        key=("model",),
        better={"bytes_per_hour": -1, "lost_s": -1},
        columns=(
            Column("model", "model"),
            Column("minutes of sound", "minutes", number(0)),
            Column("in minutes", "wall_minutes", number(1)),
            Column("utterances", "utterances"),
            Column("answers", "turns"),
            Column("spoken over", "interrupted"),
            Column("cuts", "cuts"),
            Column("of both devices", "server_cuts"),
            Column("words s", "spoken_s", number(0)),
            Column("lost s", "lost_s", number(2)),
            Column("anonymous MiB, warm", "anon_warm_bytes", mib),
            Column("at the end", "anon_last_bytes", mib),
            Column("MiB an hour", "bytes_per_hour", mib),
            Column("threads left", "threads_left"),
            Column("files more", "files_more"),
        ),
    ),
    "talk wake words": Kind(
        title="Wake words",
        key=("name",),
        better={"missed": -1, "false_alarms": -1},
        columns=(
            Column("word", "name"),
            Column("spoken", "spoken"),
            Column("missed", "missed"),
            Column("false alarms", "false_alarms"),
            Column("in minutes", "minutes", number(0)),
        ),
    ),
    "soak": Kind(
        title="Speech in a loop through detection and encoder",
        key=("model",),
        better={"last_step_s": -1, "pss_last_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("minutes of sound", "minutes", number(1)),
            Column("utterances", "utterances"),
            Column("blocks lost", "blocks_lost"),
            Column("most behind s", "most_behind_s", number(2)),
            Column("step s, first tenth", "first_step_s", number(4)),
            Column("step s, last tenth", "last_step_s", number(4)),
            Column("PSS MiB, third minute", "pss_third_minute_bytes", mib),
            Column("PSS MiB, end", "pss_last_bytes", mib),
            Column("highest", "pss_most_bytes", mib),
        ),
    ),
    "pictures": Kind(
        title="One picture through the encoder",
        key=("system", "file"),
        better={"picture_s": -1, "peak_pss_bytes": -1},
        columns=(
            Column("system", "system"),
            Column("file", "file"),
            Column("s / picture", "picture_s", measured(2)),
            Column("CPU s", "cpu_s", number(1)),
            Column("peak PSS MiB", "peak_pss_bytes", mib),
            Column("of it anonymous", "anon_bytes", mib),
            Column("relative rms", "relative_rms", scientific),
        ),
    ),
    "conversation": Kind(
        title="A conversation with a new picture in each turn",
        key=("model", "pictures"),
        better={"peak_pss_bytes": -1},
        columns=(
            Column("model", "model"),
            Column("pictures", "pictures"),
            Column("n_ctx", "n_ctx"),
            Column("turns dropped", "turns_dropped"),
            Column("planned MiB", "planned_peak_bytes", mib),
            Column("measured PSS MiB", "peak_pss_bytes", mib),
            Column("plan is off by", "error", difference),
        ),
    ),
}


@dataclass
class Section:
    """One benchmark's outcome, or the part of it that was measured before Ctrl-C (``stopped``)."""

    kind: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timelines: dict[str, list[Row]] = field(default_factory=dict)
    stopped: bool = False

    @property
    def title(self) -> str:
        return KINDS[self.kind].title

    @property
    def key(self) -> tuple[str, ...]:
        return KINDS[self.kind].key

    @property
    def better(self) -> dict[str, int]:
        return KINDS[self.kind].better

    @property
    def head(self) -> list[str]:
        return [column.head for column in KINDS[self.kind].columns]

    @property
    def cells(self) -> list[list[str]]:
        columns = KINDS[self.kind].columns
        return [[column.show(row, column.field) for column in columns] for row in self.rows]

    @property
    def tables(self) -> list[list[list[str]]]:
        """The tables to show, head first: of several models' memory a small one of boards by models
        comes before.
        """
        whole = [self.head, *self.cells]
        return [self.overview, whole] if self.overview else [whole]

    @property
    def overview(self) -> list[list[str]]:
        several = len({row["model"] for row in self.rows if "model" in row}) > 1
        return board_overview(self.rows) if self.kind == "memory" and several else []

    def markdown(self) -> str:
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([f"## {self.title}", *map(markdown_table, self.tables), notes])

    def note(self, *texts: str) -> None:
        self.notes += [text for text in texts if text not in self.notes]

    def add(self, other: Section) -> None:
        """Rows, notes and timelines of another section of the same kind."""
        assert other.kind == self.kind, (other.kind, self.kind)
        self.rows += other.rows
        self.note(*other.notes)
        self.timelines |= other.timelines
        self.stopped = self.stopped or other.stopped


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


OVERVIEW_NOTE = (
    "First table: the peak that the board's plan counts; what was measured under that board's "
    "limit here, and by how much the plan for this machine's CPU was off. `no:` refused, with what "
    "it would need."
)


def board_overview(rows: Sequence[Row]) -> list[list[str]]:
    """Boards by models: what each board's plan counts, and what was measured under its limit."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    by_place = {(row["device"], row["model"]): row for row in rows}
    table = [["MiB", "to spend", *models]]
    for board, usable_bytes in {row["device"]: row["usable_bytes"] for row in rows}.items():
        found = [_planned_and_measured(by_place.get((board, model))) for model in models]
        table.append([board, in_mib(usable_bytes), *found])
    return table


def _planned_and_measured(row: Row | None) -> str:
    if row is None:
        return ABSENT
    if not row["fits"]:
        return f"no: {in_mib(row['needed_bytes'])}"
    planned = in_mib(row["planned_bytes"])
    if "peak_pss_bytes" not in row:
        return planned
    return f"{planned}; {in_mib(row['peak_pss_bytes'])} ({signed(row['error'])})"
