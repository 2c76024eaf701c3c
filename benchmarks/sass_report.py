"""What the CUDA kernels' machine code says, without a GPU: resources, issued instructions, and a roofline model.

    python benchmarks/sass_report.py                     # rcp_kernels/_C_cuda.abi3.so, or what nvcc compiles
    python benchmarks/sass_report.py --arch 80 86 --save docs/results

Prints tables: registers, spills and occupancy of the kernels; how many instructions a call issues for a weight, by
following the machine code with the launcher's own arguments (rcp_kernels/bench/sass_walk.py); the goals the project
set itself, beside what is reached; and times of LLaMA's layers on cards by their published rates, which are a model,
not measured. Exits with 1 if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rcp_kernels.bench import roofline, sass, sass_launches, sass_walk  # noqa: E402
from rcp_kernels.bench.roofline import CARDS, LABEL, MODELS, Work, estimate  # noqa: E402
from rcp_kernels.bench.sass_launches import Problem  # noqa: E402

LIBRARY = ROOT / "rcp_kernels" / "_C_cuda.abi3.so"
# Of the multiprocessors depends how a call is split: those of the card that each architecture's tables are for.
CARD_OF = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
LLAMAS = ("LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-3-8B")
SHOWN = ("IMMA", "HMMA", "PRMT", "LOP3", "SHF", "IMAD", "IADD3", "FFMA", "FADD/FMUL", "HADD2", "I2F")
SHOWN += ("LDG", "LDGSTS", "LDS", "STS", "STG", "other")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]

    def show(self) -> None:
        text = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in self.rows]
        if importlib.util.find_spec("rich"):
            from rich import box
            from rich.console import Console
            from rich.table import Table as RichTable

            table = RichTable(*self.columns, title=self.title, box=box.SIMPLE_HEAD, title_justify="left")
            for row in text:
                table.add_row(*row)
            console = Console()
            # A table that is cut off at the edge of a pipe says nothing.
            console.width = max(console.width, 40 + 12 * len(self.columns))
            console.print(table)
            return
        widths = [max(map(len, column)) for column in zip(self.columns, *text, strict=True)]
        print(f"\n{self.title}")
        for row in (self.columns, *text):
            print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())

    def save(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in self.rows)


# A problem, the architecture whose code it runs, and the multiprocessors of the card.
Call = tuple[Problem, int, int]


class Code:
    """The machine code of kernels, from a file as far as it has them, else compiled."""

    def __init__(self, files: Sequence[Path], architectures: Sequence[int], launches: bool = True) -> None:
        self.kernels: dict[tuple[int, str], sass.Kernel] = {}
        for file in files:
            self._take([kernel for kernel in sass.load(file) if kernel.arch in architectures])
        self.launcher = sass_launches.Launcher() if launches else None
        self.walks: dict[tuple[int, sass_walk.Launch], sass_walk.Walk] = {}

    def _take(self, kernels: list[sass.Kernel]) -> None:
        self.kernels |= {(kernel.arch, kernel.name): kernel for kernel in kernels}

    def compile_missing(self, calls: Sequence[Call]) -> None:
        """All kernels that the calls launch and that are not there, one compilation for each architecture."""
        missing: dict[int, set[str]] = {}
        for problem, arch, multiprocessors in calls:
            for launch in self.launcher.launches(problem, multiprocessors, arch):
                if (arch, launch.kernel) not in self.kernels:
                    missing.setdefault(arch, set()).add(launch.kernel)
        for arch, names in missing.items():
            self._take(sass.load(sass_launches.compile_cubin(names, arch)))

    def count(self, problem: Problem, arch: int, multiprocessors: int | None = None) -> Count:
        """Follow the launches of one call on a card with that many multiprocessors."""
        parts = []
        for launch in self.launcher.launches(problem, multiprocessors or CARD_OF[arch], arch):
            if (arch, launch.kernel) not in self.kernels:
                self._take(sass.load(sass_launches.compile_cubin([launch.kernel], arch)))
            key = (arch, launch)
            if key not in self.walks:
                kernel = self.kernels[arch, launch.kernel]
                self.walks[key] = sass_walk.walk_launch(kernel, launch, sass_launches.buffers())
            parts.append((launch, self.walks[key]))
        return Count(problem, arch, parts, self.launcher.weight_bytes(problem))


@dataclass(frozen=True)
class Count:
    """What one call of lut_linear issues and loads."""

    problem: Problem
    arch: int
    parts: list[tuple[sass_walk.Launch, sass_walk.Walk]]
    weight_bytes: int

    @property
    def weights(self) -> int:
        return self.problem.rows * self.problem.columns

    @property
    def warp_instructions(self) -> float:
        return sum(walk.total for _, walk in self.parts)

    @property
    def per_weight(self) -> float:
        """Instructions of a thread for a weight: 32 times the warps' instructions."""
        return 32 * self.warp_instructions / self.weights

    @property
    def prologue(self) -> float:
        """Instructions that quantizing (and rotating) x takes, relative to all others."""
        quantizing = sum(walk.quantizing for _, walk in self.parts)
        if len(self.parts) > 1:
            quantizing += self.parts[0][1].total
        return quantizing / (self.warp_instructions - quantizing)

    @property
    def classes(self) -> dict[str, float]:
        """Per weight."""
        total: dict[str, float] = {}
        for _, walk in self.parts:
            for name, n in sass.count_classes(walk.kernel.instructions, list(walk.issued)).items():
                total[name] = total.get(name, 0.0) + 32 * n / self.weights
        return total

    def issued(self, names: frozenset[str] | tuple[str, ...]) -> float:
        """Warp instructions of these opcodes."""
        return sum(
            float(n)
            for _, walk in self.parts
            for instruction, n in zip(walk.kernel.instructions, walk.issued, strict=True)
            if instruction.name in names
        )

    def loaded_bytes(self, buffer: str | None = None) -> float:
        """Bytes of the 32-byte sectors that all warps ask for, of one buffer or of all."""
        return sum(
            32 * traffic.sectors
            for _, walk in self.parts
            for name, traffic in walk.loads.items()
            if buffer in (None, name)
        )

    @property
    def weight_load_bytes(self) -> list[int]:
        """Widths of a lane's loads of the weight, in bytes."""
        return sorted(
            {size for _, walk in self.parts if "weight" in walk.loads for size in walk.loads["weight"].requests}
        )

    @property
    def fetched_times(self) -> float:
        """Bytes of the weight that are asked for, over those it has; the header, which every warp reads, apart."""
        header = 32.0 * sum(launch.warps for launch, walk in self.parts if "weight" in walk.loads)
        return max(self.loaded_bytes("weight") - header, 0.0) / (self.weight_bytes - 128)

    @property
    def main(self) -> tuple[sass_walk.Launch, sass_walk.Walk]:
        """The launch that does the multiplying."""
        return max(self.parts, key=lambda part: part[1].total)

    @property
    def occupancy(self) -> sass.Occupancy:
        launch, walk = self.main
        shared = walk.kernel.shared_bytes + launch.shared_bytes
        return sass.occupancy(self.arch, launch.block[0], walk.kernel.registers, shared)

    @property
    def work(self) -> Work:
        tokens, rows, columns = self.problem.tokens, self.problem.rows, self.problem.columns
        int8 = self.issued(("IMMA",)) > 0
        each = roofline.IMMA_OPERATIONS if int8 else roofline.HMMA_OPERATIONS
        return Work(
            dram_bytes=self.weight_bytes + 2 * tokens * (rows + columns),
            warp_instructions=self.warp_instructions,
            alu_instructions=self.issued(sass.ALU),
            tensor_operations=each * self.issued(sass.TENSOR),
            tensor_is_int8=int8,
            blocks=self.main[0].blocks,
        )


def problems(bits: Sequence[int]) -> list[Problem]:
    """The calls of the tables: 4096 x 4096, one and eight tokens."""
    calls = []
    for b in bits:
        calls += [Problem(b, a, m) for a in (4, 8, 16) for m in (1, 8)]
        calls.append(Problem(b, 4, 1, rotation_group=128))
    return calls


def code_for(on: roofline.Card, architectures: Sequence[int]) -> int | None:
    """The newest of the architectures whose code runs on the card."""
    return max((arch for arch in architectures if arch <= on.arch), default=None)


def roofline_calls(architectures: Sequence[int]) -> list[Call]:
    """The calls of the roofline tables."""
    calls = []
    for on in CARDS:
        arch = code_for(on, architectures)
        if arch is not None:
            shapes = {(n, k) for model in LLAMAS for n, k, _ in MODELS[model]}
            calls += [(Problem(rows=n, columns=k), arch, on.multiprocessors) for n, k in sorted(shapes)]
    on = roofline.card("RTX A6000")
    arch = code_for(on, architectures)
    if arch is not None:
        calls += [(Problem(3, 16, 1, n, k), arch, on.multiprocessors) for n, k, _ in MODELS["Qwen3-4B"]]
    return calls


def resources(kernels: Sequence[sass.Kernel]) -> Table:
    columns = ("arch", "kernel", "registers", "static shared B", "stack B", "spills", "instructions")
    rows: list[tuple[object, ...]] = [
        (k.arch, sass.short_name(k.name), k.registers, k.shared_bytes, k.stack_bytes, k.spills, len(k.instructions))
        for k in sorted(kernels, key=lambda k: (k.arch, k.name))
    ]
    return Table("Resources of the compiled kernels", columns, rows)


def counts_table(counts: Sequence[Count]) -> Table:
    columns = (
        "arch",
        "call",
        "kernel",
        "grid",
        "issued/weight",
        "prologue",
        "weight B/weight",
        "weight loads B",
        "fetched",
    )
    columns += ("registers", "shared B", "occupancy", "assumed branches")
    rows: list[tuple[object, ...]] = []
    for c in counts:
        launch, walk = c.main
        widths = "+".join(map(str, c.weight_load_bytes))
        shared = walk.kernel.shared_bytes + launch.shared_bytes
        o = c.occupancy
        rows.append(
            (
                c.arch,
                str(c.problem),
                sass.short_name(walk.kernel.name),
                f"{launch.grid[0]}x{launch.grid[1]}",
                c.per_weight,
                c.prologue if c.problem.act_bits < 16 else "",
                c.weight_bytes / c.weights,
                widths,
                c.fetched_times,
                walk.kernel.registers,
                shared,
                f"{o.warps} warps ({o.limited_by})",
                sum(len(w.assumed) for _, w in c.parts),
            )
        )
    return Table("Issued instructions at 4096 x 4096, G = 128, float16 x", columns, rows)


def classes_table(counts: Sequence[Count]) -> Table:
    rows = [(c.arch, str(c.problem), *(c.classes.get(name, 0.0) for name in SHOWN)) for c in counts]
    return Table("Instructions per weight by class", ("arch", "call", *SHOWN), rows)


def bars(code: Code, architectures: Sequence[int]) -> Table:
    """What the project asked for, and what is reached."""
    rows: list[tuple[object, ...]] = []

    def bar(name: str, arch: object, limit: float, value: float, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        rows.append((name, arch, f"{'>=' if at_least else '<='} {limit:g}", value, "met" if met else "MISSED"))

    for arch in [a for a in architectures if a in (80, 86)]:
        one, eight = code.count(Problem(), arch), code.count(Problem(tokens=8), arch)
        bar("W2A4 M=1, issued instructions per weight", arch, 0.95, one.per_weight)
        bar("W2A4 M=8 / M=1, instructions", arch, 1.3, eight.per_weight / one.per_weight)
        bar("W2A4 M=8 / M=1, global bytes loaded", arch, 1.3, eight.loaded_bytes() / one.loaded_bytes())
        bar("W3A4 / W2A4 M=1, instructions", arch, 1.3, code.count(Problem(3), arch).per_weight / one.per_weight)
        bar("quantization, share added", arch, 0.10, one.prologue)
        rotated = code.count(Problem(rotation_group=128), arch)
        bar("rotation + quantization, share added", arch, 0.10, rotated.prologue)
        bar("bytes of weights fetched / stored, W2A4 M=1", arch, 1.0, one.fetched_times)
        bar("narrowest weight load, bytes", arch, 16, float(min(one.weight_load_bytes)), at_least=True)
        if arch == 86:
            bar("W3A16 M=1, issued instructions per weight", arch, 2.0, code.count(Problem(3, 16), arch).per_weight)
    for name in ("A100-80", "RTX 3090"):
        on = roofline.card(name)
        if on.arch in architectures:
            margin = estimate(code.count(Problem(), on.arch, on.multiprocessors).work, on)
            bar(f"issue margin over DRAM, 4096 x 4096, {name} ({LABEL})", on.arch, 2.0, margin.issue_margin, True)
    return Table("Bars of issues 4 and 6", ("what", "arch", "bar", "reached", ""), rows)


def layers(code: Code, architectures: Sequence[int]) -> Table:
    """W2A4, one token, each layer of each model on each card."""
    columns = (
        "card",
        "code of",
        "model",
        "layer N x K",
        "us DRAM",
        "us issue",
        "us issue, busiest SM",
        "us ALU",
        "us tensor",
    )
    columns += ("us", "bound by", "us fp16 GEMV", "us published scheme", "x fp16")
    rows: list[tuple[object, ...]] = []
    for on in CARDS:
        arch = code_for(on, architectures)
        if arch is None:
            continue
        for model in LLAMAS:
            for n, k, _ in MODELS[model]:
                e = estimate(code.count(Problem(rows=n, columns=k), arch, on.multiprocessors).work, on)
                fp16 = estimate(roofline.fp16_gemv(n, k), on).time
                published = estimate(roofline.published_gemv(n, k), on).time
                rows.append(
                    (
                        on.name,
                        f"sm_{arch}",
                        model,
                        f"{n} x {k}",
                        e.dram,
                        e.issue,
                        e.busiest,
                        e.alu,
                        e.tensor,
                        e.time,
                        e.bound_by,
                        fp16,
                        published,
                        fp16 / e.time,
                    )
                )
    return Table(f"W2A4, one token: {LABEL}", columns, rows)


def per_model(table: Table) -> Table:
    """The linear layers of one decoder layer together."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in table.rows:
        card, model, shape = str(row[0]), str(row[2]), str(row[3])
        times = next(t for n, k, t in MODELS[model] if f"{n} x {k}" == shape)
        total = sums.setdefault((card, model), [0.0] * 3)
        for i, at in enumerate((9, 11, 12)):
            total[i] += times * float(str(row[at]))
    rows: list[tuple[object, ...]] = [
        (card, model, us, fp16, published, fp16 / us, fp16 / published)
        for (card, model), (us, fp16, published) in sums.items()
    ]
    columns = ("card", "model", "us ours", "us fp16 GEMV", "us published scheme", "ours x fp16", "published x fp16")
    return Table(f"Linear layers of one decoder layer, W2A4, one token: {LABEL}", columns, rows)


def decode(code: Code, architectures: Sequence[int]) -> Table:
    """Qwen3-4B on an RTX A6000, batch 1, W3A16: issue 6, item 4."""
    on, model = roofline.card("RTX A6000"), "Qwen3-4B"
    arch = code_for(on, architectures)
    rows: list[tuple[object, ...]] = []
    for name, bits in (("3.25 bits a weight (published)", 3.25), ("4.25 bits a weight (3 bits stored in 4)", 4.25)):
        traffic = roofline.decode_traffic(model, bits)
        rows.append((name, bits, traffic.packed_bytes / 1e9, traffic.ratio, "", "", ""))
    if arch is not None:
        issue = dram = busiest = packed = 0.0
        weights = sum(n * k * times for n, k, times in MODELS[model])
        for n, k, times in MODELS[model]:
            count = code.count(Problem(3, 16, 1, n, k), arch, on.multiprocessors)
            e = estimate(count.work, on)
            issue, busiest, dram = issue + times * e.issue, busiest + times * e.busiest, dram + times * e.dram
            packed += times * count.weight_bytes
        bits = 8 * packed / weights
        traffic = roofline.decode_traffic(model, bits)
        scale = roofline.LAYERS[model] / 1e3
        rows.append(
            (
                f"ours, W3A16 G=128, sm_{arch} code",
                bits,
                traffic.packed_bytes / 1000000000.0,
                traffic.ratio,
                dram * scale,
                issue * scale,
                busiest * scale,
            )
        )
    columns = ("Qwen3-4B, one token", "bits a weight", "GB of linear layers", "x fp16 by weight traffic, fp16 lm_head")
    columns += ("ms DRAM, linear layers", "ms issue", "ms issue, busiest SM")
    return Table(f"Decode on an RTX A6000, batch 1: {LABEL}; published, measured by its authors: 3.42x", columns, rows)


def plot(table: Table, path: Path) -> None:
    """A decoder layer of LLaMA-2-7B on each card: three stacked sums by model."""
    from rcp_kernels import extras

    extras.require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cards = list(dict.fromkeys(str(row[0]) for row in table.rows))
    models = list(dict.fromkeys(str(row[1]) for row in table.rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(4 * len(models), 0.55 * len(cards) + 1.6), sharey=True)
    for axis, model in zip(axes, models, strict=True):
        rows = [row for row in table.rows if row[1] == model]
        for i, (title, column) in enumerate((("W2A4 (ours)", 2), ("fp16 GEMV", 3), ("published scheme", 4))):
            places = [cards.index(str(row[0])) + 0.27 * (i - 1) for row in rows]
            axis.barh(places, [float(str(row[column])) for row in rows], 0.25, label=title)
        axis.set_title(model)
        axis.set_xlabel("us of a decoder layer's linear layers")
        axis.set_xscale("log")
        axis.set_yticks(range(len(cards)), cards)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, -0.12), ncols=3)
    figure.suptitle(f"One token, roofline: {LABEL}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="cubins, objects or libraries; default: the package's")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 86], choices=sorted(sass.LIMITS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], choices=(2, 3, 4))
    parser.add_argument("--resources-only", action="store_true", help="registers and spills, nothing that needs nvcc")
    parser.add_argument("--compile", action="store_true", help="compile what is counted, whatever has been built")
    parser.add_argument("--save", type=Path, help="folder for the CSV files and the plot")
    options = parser.parse_args(arguments)
    files = options.files or ([LIBRARY] if LIBRARY.exists() and not options.compile else [])
    if options.resources_only and not files:
        parser.error(f"--resources-only needs a file, got none and no {LIBRARY}; build the package with nvcc")
    code = Code(files, options.arch, launches=not options.resources_only)
    tables: dict[str, Table] = {}
    if not options.resources_only:
        calls = problems(options.bits)
        code.compile_missing(
            [(problem, arch, CARD_OF[arch]) for arch in options.arch for problem in calls]
            + roofline_calls(options.arch)
        )
        counts = [code.count(problem, arch) for arch in options.arch for problem in calls]
        tables["sass_counts"], tables["sass_classes"] = counts_table(counts), classes_table(counts)
        tables["sass_bars"] = bars(code, options.arch)
        tables["roofline_layers"] = layers(code, options.arch)
        tables["roofline_models"] = per_model(tables["roofline_layers"])
        tables["roofline_decode"] = decode(code, options.arch)
    tables = {"sass_kernels": resources(list(code.kernels.values())), **tables}
    spilled = [kernel for kernel in code.kernels.values() if kernel.spills or kernel.local_bytes]
    for name, table in tables.items():
        table.show()
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            table.save(options.save / f"{name}.csv")
    if options.save and "roofline_models" in tables:
        plot(tables["roofline_models"], options.save / "roofline_models.png")
    for kernel in spilled:
        print(f"sass_report: {sass.short_name(kernel.name)} on sm_{kernel.arch} spills {kernel.spills} instructions")
    print(f"{len(code.kernels)} kernels, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
