"""How much does LIMPQ's training change its policy? Its cells beside the program on untrained step sizes.

    python benchmarks/limpq.py --data DIR --checkpoints DIR

For each of LIMPQ's finished cells of compare.py: how many of the inner operands' bit-widths the same integer
program picks from step sizes as calibrated on the float base, without any training. It prints a table and
keeps it in results/limpq.json; a minute on two cores, and no test image.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import arq  # noqa: E402
import models  # noqa: E402
from benchmarks import compare, rivals  # noqa: E402

OUT = ROOT / "results" / "limpq.json"


def table_of(rows: list[dict]) -> str:
    lines = ["| cell | widths that training leaves | of |", "|---|---|---|"]
    lines += [f"| {row['cell']} | {row['same']} | {row['operands']} |" for row in rows]
    return "\n".join(lines)


def untrained(frame: compare.Frame) -> models.Policy:
    """LIMPQ's policy if its training does nothing."""
    calibrate = partial(arq.calibrate, images=frame.search_images, config=frame.config)
    of = copy.deepcopy(frame.base), frame.table, frame.config.budget, calibrate
    started = models.uniform_policy(frame.table, models.MAX_BITS)  # a policy to begin with: steps are set
    return rivals.limpq(*of, train=lambda classifier, loss: models.set_policy(classifier, started))


def same_widths(table, first: models.Policy, second: models.Policy) -> list[bool]:
    """Operand by operand, without the first and the last layer, whose widths are fixed."""
    return [a == b for layer in table[1:-1] for a, b in zip(first[layer.name], second[layer.name])]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--checkpoints", type=Path, default=Path("."))
    options = parser.parse_args(argv)
    rows = []
    for cell in (r for r in compare.finished() if r["method"].startswith("LIMPQ")):
        frame = compare.Frame(cell, options.data, options.checkpoints)
        same = same_widths(frame.table, untrained(frame), cell["policy"])
        rows.append({"cell": compare.name_of(cell), "same": sum(same), "operands": len(same)})
    arq.write_whole(OUT, rows)
    print(table_of(rows))


if __name__ == "__main__":
    main()
