"""Train: from a spec to a model, a report and a number, in one call.

    python examples/04_train.py [OUT] [STEPS] [PATH=VALUE ...]

Trains the ``tiny`` model on the source of Python's own standard library. Call it again with the same
folder and it goes on where it stopped.
"""

import sys
from pathlib import Path

import cofire as cf
from cofire.spec import RunSpec, load_as
from cofire.train.report import write_report
from cofire.train.run_record import read_run
from cofire.train.summary import headline, summarise


def main(out: Path, steps: int, overrides: list[str]) -> None:
    # A run is data: a preset and the fields that differ.
    run = load_as(RunSpec, "demo", ["model=tiny", f"steps={steps}", *overrides])

    # The plan comes first: this much memory and work.
    plan = cf.estimate(run)
    print(f"planned: {plan.parameters.total:,} parameters, {plan.training_memory.total / 1e6:.0f} MB")

    cf.fit(run, out, resume=out.exists())

    # Everything that the run measured is in its folder.
    record = read_run(out)
    print("measured:", headline(summarise(record)))
    for event in record.validations[-1:]:
        print(f"last validation: step {event['step']}, {event['bits_per_byte']:.3f} bits per byte")
    print("report:", write_report(out))


if __name__ == "__main__":
    main(Path((sys.argv[1:] or ["runs/example"])[0]), int((sys.argv[2:] or ["60"])[0]), sys.argv[3:])
