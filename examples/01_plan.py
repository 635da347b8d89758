"""Plan: what a model costs before anything is built. Needs no torch and no accelerator.

python examples/01_plan.py [PRESET ...]
"""

import sys

import cofire as cf
from cofire.spec.units import format_count, format_quantity


def main(names: list[str]) -> None:
    print(f"{'model':18} {'parameters':>10} {'activated':>10} {'KV per token':>13} {'training per token':>19}")
    for name in names:
        plan = cf.estimate(cf.load(name))
        count = plan.parameters
        print(
            f"{name:18} {format_count(count.total):>10} {format_count(count.activated_head_only):>10} "
            f"{format_quantity(plan.kv_cache.bytes_per_token, 'B'):>13} "
            f"{format_quantity(plan.training_flops.main, 'FLOP'):>19}"
        )

    # A spec is a value: change one field and ask again.
    small = cf.load("small")
    wider = small.model_copy(update={"hidden_size": 2 * small.hidden_size})
    ratio = cf.estimate(wider).parameters.total / cf.estimate(small).parameters.total
    print(f"\nsmall with twice the width: {ratio:.2f} times the parameters")


if __name__ == "__main__":
    main(sys.argv[1:] or ["small", "deepseek-v2", "deepseek-v3", "qwen2.5-72b", "llama3.1-405b"])
