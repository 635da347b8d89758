"""What bounds decoding: the network under expert parallelism, and what speculative decoding gives back.

Closed formulas of arXiv 2505.09343, section 2.3. Left out: latency, compute and contention, which
``cofire.plan.serving`` counts around the same exchange.
"""

from __future__ import annotations

from cofire.spec.spec_type import Spec


class ExpertParallelLimit(Spec):
    """Lower bounds in seconds; ``tokens_per_s`` is one sequence's rate, ``1 / time_per_token_s``."""

    communication_s: float
    layer_s: float
    time_per_token_s: float
    tokens_per_s: float


def expert_parallel_limit(
    hidden_size: int,
    num_layers: int,
    bandwidth_bytes_per_s: float,
    tokens_per_device: int = 32,
    num_destinations: int = 9,
    bytes_per_number: float = 3,
) -> ExpertParallelLimit:
    """Return the bound that the network sets on decoding with one expert per device.

    ``t_comm = bytes_per_number * tokens_per_device * num_destinations * hidden_size / bandwidth`` covers dispatch and
    combine of one micro-batch; a layer takes two of them, since two micro-batches overlap and their compute hides.

    Args:
        hidden_size: Numbers per token; the paper's example prints "7K" and means 7000, DeepSeek-V3 has 7168.
        num_layers: Layers of the model; each is counted as a mixture layer.
        bandwidth_bytes_per_s: One device's bandwidth, one way.
        tokens_per_device: Tokens of a micro-batch on each device.
        num_destinations: Experts per token, shared ones included.
        bytes_per_number: Dispatch plus combine: 1 (FP8) + 2 (BF16).

    Returns:
        The bounds.
    """
    size = exchange_bytes(tokens_per_device, num_destinations, hidden_size, bytes_per_number)
    communication = size / bandwidth_bytes_per_s
    per_token = num_layers * 2 * communication
    return ExpertParallelLimit(
        communication_s=communication,
        layer_s=2 * communication,
        time_per_token_s=per_token,
        tokens_per_s=1 / per_token,
    )


def exchange_bytes(
    tokens_per_device: float, num_destinations: float, hidden_size: int, bytes_per_number: float
) -> float:
    """Return the bytes that one device sends, or receives, when each of its tokens goes to several destinations.

    Args:
        tokens_per_device: Tokens of a micro-batch on each device.
        num_destinations: Copies of each token that travel.
        hidden_size: Numbers per token.
        bytes_per_number: 1 for a dispatch in FP8, 2 for a combine in BF16, 3 for both.

    Returns:
        Bytes.
    """
    return bytes_per_number * tokens_per_device * num_destinations * hidden_size


def mtp_speed_up(acceptance: float, num_layers: int) -> float:
    """Return the rate of decoding with one drafted token against decoding without.

    Args:
        acceptance: Fraction of drafted tokens that the main model accepts.
        num_layers: Layers of the main model; the draft layer costs one of them, and nothing else is counted.

    Returns:
        ``(1 + acceptance) / (1 + 1 / num_layers)``.
    """
    return (1 + acceptance) / (1 + 1 / num_layers)
