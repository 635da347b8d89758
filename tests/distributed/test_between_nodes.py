"""Sums between nodes: real processes over TCP on the loopback, against a sum in the order of the tree.

Each node is a process with one rank. What a process returns, or the error that it raised, comes back over a queue.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from cofire.collectives.between_nodes import NodeExchange, Operation
from cofire.collectives.elements import Op, element_of
from cofire.collectives.schedule import NodeProgram, all_reduce_program, rooted_program
from cofire.collectives.shm import Kind
from cofire.collectives.transport import FailureBoard, Transport
from cofire.errors import CollectiveError
from cofire.network.double_tree import double_tree

TIMEOUT_S = 20.0
CHUNK = 96
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int32,
    torch.int64,
)


class Slices:
    """The chunks of a tensor; keeps a record of what it is told."""

    def __init__(self, tensor: torch.Tensor, chunk_count: int) -> None:
        self.parts = list(tensor.split(chunk_count)) if tensor.numel() else []
        self.num_chunks = self.num_slots = len(self.parts)
        self.published: list[int] = []
        self.sent: list[int] = []

    def buffer(self, chunk: int) -> torch.Tensor:
        return self.parts[chunk]

    def wait_reduced(self, chunk: int) -> None:
        pass

    def publish(self, chunk: int) -> None:
        self.published.append(chunk)

    def mark_sent(self, chunk: int) -> None:
        self.sent.append(chunk)


class Node:
    """One node's transport and exchange, and its operations in sequence."""

    def __init__(self, port: int, node: int, num_nodes: int, timeout_s: float) -> None:
        self.node, self.num_nodes, self.timeout_s, self.sequence = node, num_nodes, timeout_s, 0
        self.store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
        hosts = [f"host{number}" for number in range(num_nodes)]
        transport = Transport.connect(self.store, node, num_nodes, timeout_s, hosts, 2, "lo")
        self.exchange = NodeExchange(transport, FailureBoard(self.store))

    def run(
        self,
        program: NodeProgram,
        tensor: torch.Tensor,
        kind: Kind = Kind.ALL_REDUCE,
        op: Op = Op.SUM,
        root: int = 0,
        chunk_count: int = CHUNK,
        divisor: float = 1.0,
    ) -> Slices:
        chunks = Slices(tensor, chunk_count)
        operation = Operation(
            self.sequence,
            kind,
            element_of(tensor.dtype),
            op,
            tensor.numel(),
            root,
            chunk_count,
            program.period,
            divisor,
        )
        self.sequence += 1
        self.exchange.run(program, chunks, operation, time.monotonic() + self.timeout_s)
        assert chunks.published == chunks.sent == list(range(chunks.num_chunks))
        return chunks


def enter(
    work: Callable[..., Any],
    port: int,
    node: int,
    num_nodes: int,
    survivors: int,
    timeout_s: float,
    answers: Any,
    args: Any,
) -> None:
    torch.set_num_threads(1)
    member = Node(port, node, num_nodes, timeout_s)
    try:
        answer = work(member, *args)
    except CollectiveError as error:
        answer = f"CollectiveError: {error}"
    answers.put((node, answer))
    # Others may still be in the middle of what failed here: do not let the end of this process be their error.
    member.store.add("ended", 1)
    until = time.monotonic() + 5
    while member.store.add("ended", 0) < survivors and time.monotonic() < until:
        time.sleep(0.02)
    member.exchange.close()


def together(
    num_nodes: int, work: Callable[..., Any], *args: Any, survivors: int | None = None, timeout_s: float = TIMEOUT_S
) -> dict[int, Any]:
    """Run ``work(node, *args)`` in one process per node; return the answers of those that survive it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "cofire.collectives.between_nodes"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    expected = num_nodes if survivors is None else survivors
    processes = [
        context.Process(target=enter, args=(work, store.port, node, num_nodes, expected, timeout_s, answers, args))
        for node in range(num_nodes)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(expected):
            node, answer = answers.get(timeout=60)
            found[node] = answer
    except queue.Empty:
        pytest.fail(f"only nodes {sorted(found)} of {num_nodes} answered: {found}")
    finally:
        for node, process in enumerate(processes):
            process.join(10 if node in found else 0)
            if process.is_alive():
                process.kill()
    return found


def values(node: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 * seed + node)
    if not dtype.is_floating_point:
        return torch.randint(-1000, 1000, (count,), generator=random, dtype=dtype)
    return (torch.randn(count, generator=random, dtype=torch.float64) * 4).to(dtype)


def tree_sum(num_nodes: int, count: int, dtype: torch.dtype, divisor: float = 1.0) -> torch.Tensor:
    """Return the sum as the trees define it: own, then each child's sum by number; one rounding at each node."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32 if dtype.is_floating_point else dtype
    trees = double_tree(num_nodes)

    def total(tree: Any, node: int) -> torch.Tensor:
        acc = values(node, count, dtype).to(wide)
        for child in range(num_nodes):
            if tree[child] == node:
                acc = acc + total(tree, child).to(wide)
        if tree[node] < 0 and divisor != 1:
            acc = acc / divisor
        return acc.to(dtype)

    whole = [total(tree, int((tree < 0).argmax())) for tree in trees]
    which = (torch.arange(count) // CHUNK) % 2
    return torch.where(which == 0, whole[0].to(wide), whole[1].to(wide)).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 7, 7919)


def all_sizes(node: Node) -> list[bytes]:
    found = []
    for _ in range(2):
        for size in SIZES:
            tensor = values(node.node, size, torch.float32)
            node.run(all_reduce_program("double_tree", node.num_nodes, node.node), tensor)
            found.append(bits(tensor))
    return found


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
def test_every_size_sums_to_the_bits_of_the_tree_on_all_nodes_twice(num_nodes: int):
    found = together(num_nodes, all_sizes)
    expected = [bits(tree_sum(num_nodes, size, torch.float32)) for size in SIZES]
    for node in range(num_nodes):
        assert found[node] == expected * 2


def all_types(node: Node) -> list[bytes]:
    found = []
    for dtype in DTYPES:
        tensor = values(node.node, 1000, dtype)
        node.run(all_reduce_program("double_tree", node.num_nodes, node.node), tensor)
        found.append(bits(tensor))
    mean = values(node.node, 1000, torch.bfloat16)
    program = all_reduce_program("double_tree", node.num_nodes, node.node)
    node.run(program, mean, op=Op.AVERAGE, divisor=float(node.num_nodes))
    return [*found, bits(mean)]


def test_every_type_travels_as_bytes_and_rounds_once_per_node():
    num_nodes = 4
    found = together(num_nodes, all_types)
    expected = [bits(tree_sum(num_nodes, 1000, dtype)) for dtype in DTYPES]
    expected.append(bits(tree_sum(num_nodes, 1000, torch.bfloat16, divisor=4.0)))
    for node in range(num_nodes):
        for name, got, right in zip([*DTYPES, "mean"], found[node], expected, strict=True):
            assert got == right, (node, name)


def rings_and_roots(node: Node) -> dict[str, list[int]]:
    count, dtype = 11 * CHUNK + 5, torch.int64
    found = {}
    ring = values(node.node, count, dtype)
    node.run(all_reduce_program("ring", node.num_nodes, node.node), ring)
    zoned = values(node.node, count, dtype)
    zones = tuple("ab"[number % 2] for number in range(node.num_nodes))
    node.run(all_reduce_program("double_tree", node.num_nodes, node.node, zones), zoned)
    found["ring"], found["zoned"] = ring.tolist(), zoned.tolist()
    largest = values(node.node, count, dtype)
    node.run(all_reduce_program("ring", node.num_nodes, node.node), largest, op=Op.MAX)
    found["max"] = largest.tolist()
    for root in (0, node.num_nodes - 1):
        reduced = values(node.node, count, dtype)
        program = rooted_program("reduce", node.num_nodes, node.node, root)
        node.run(program, reduced, Kind.REDUCE, root=root)
        told = values(node.node, count, dtype)
        program = rooted_program("broadcast", node.num_nodes, node.node, root)
        node.run(program, told, Kind.BROADCAST, root=root)
        found[f"reduce {root}"], found[f"broadcast {root}"] = reduced.tolist(), told.tolist()
    return found


def test_rings_and_zoned_trees_and_roots_give_what_adding_gives():
    num_nodes, count = 4, 11 * CHUNK + 5
    found = together(num_nodes, rings_and_roots)
    given = torch.stack([values(node, count, torch.int64) for node in range(num_nodes)])
    for node in range(num_nodes):
        assert found[node]["ring"] == found[node]["zoned"] == given.sum(0).tolist()
        assert found[node]["max"] == given.amax(0).tolist()
        for root in (0, num_nodes - 1):
            assert found[node][f"broadcast {root}"] == given[root].tolist()
            if node == root:
                assert found[node][f"reduce {root}"] == given.sum(0).tolist()


def narrow(node: Node, algorithm: str, chunk_count: int) -> list[tuple[int, int]]:
    """Chunks so large that few are on their way, and messages that no socket takes before they are asked for."""
    found = []
    for _ in range(2):
        tensor = torch.full((24 * chunk_count + 3,), node.node + 1, dtype=torch.int32)
        node.run(all_reduce_program(algorithm, node.num_nodes, node.node), tensor, chunk_count=chunk_count)
        found.append((int(tensor.min()), int(tensor.max())))
    return found


@pytest.mark.parametrize("algorithm", ["double_tree", "ring"])
@pytest.mark.parametrize("chunk_count", [256 << 10, 512 << 10])
def test_nodes_that_send_rounds_ahead_through_narrow_windows_never_wait_for_each_other(
    algorithm: str, chunk_count: int
):
    for num_nodes in (3, 4):
        total = num_nodes * (num_nodes + 1) // 2
        found = together(num_nodes, narrow, algorithm, chunk_count)
        assert list(found.values()) == [[(total, total)] * 2] * num_nodes


def disagree(node: Node, what: str) -> None:
    tensor = values(node.node, 500, torch.float32)
    odd = node.node == 3
    program = all_reduce_program("double_tree", node.num_nodes, node.node)
    node.run(program, tensor)
    if odd and what == "size":
        tensor = values(node.node, 501, torch.float32)
    if odd and what == "type":
        tensor = values(node.node, 500, torch.int32)
    op = Op.MAX if odd and what == "op" else Op.SUM
    before = bits(tensor)
    try:
        node.run(program, tensor, op=op)
    except CollectiveError:
        if odd:
            assert bits(tensor) == before, "data arrived before the disagreement was found"
        raise


@pytest.mark.parametrize(("what", "words"), [("size", "501 f32"), ("type", "500 i32"), ("op", r"\(max\)")])
def test_a_mismatch_raises_on_all_nodes_and_names_both_sides(what: str, words: str):
    found = together(4, disagree, what)
    assert sorted(found) == [0, 1, 2, 3]
    for answer in found.values():
        assert isinstance(answer, str), found
        assert answer.startswith("CollectiveError: nodes disagree: node ")
        assert "node 3 (host3) asks for all_reduce number 1 of" in answer
        assert re.search(words, answer), answer
        assert "\n" not in answer


def die(node: Node, how: str) -> str:
    program = all_reduce_program("double_tree", node.num_nodes, node.node)
    tensor = values(node.node, 4 * CHUNK, torch.float32)
    node.run(program, tensor)
    if node.node == 1:
        if how == "in the middle":

            class Dying(Slices):
                def wait_reduced(self, chunk: int) -> None:
                    if chunk == 3:
                        os.kill(os.getpid(), signal.SIGKILL)

            chunks = Dying(tensor, CHUNK)
            operation = Operation(
                1, Kind.ALL_REDUCE, element_of(tensor.dtype), Op.SUM, tensor.numel(), 0, CHUNK, program.period
            )
            node.exchange.run(program, chunks, operation, time.monotonic() + node.timeout_s)
        if how == "by exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    first = "no error"
    try:
        node.run(program, tensor)
    except CollectiveError as error:
        first = str(error)
    with pytest.raises(CollectiveError, match="this group failed before"):
        node.run(program, tensor)
    return first


@pytest.mark.parametrize("how", ["killed", "by exit", "in the middle"])
def test_a_dead_node_raises_on_all_survivors_and_is_named(how: str):
    found = together(5, die, how, survivors=4)
    assert sorted(found) == [0, 2, 3, 4]
    for answer in found.values():
        assert answer.startswith("node 1 (host1) closed its connection during all_reduce"), found


def test_a_node_that_stands_still_raises_on_all_others_within_the_timeout():
    found = together(4, die, "stopped", survivors=3, timeout_s=3.0)
    assert sorted(found) == [0, 2, 3]
    for answer in found.values():
        assert "node 1 (host1)" in answer, found
        assert "during all_reduce" in answer or "all_reduce did not end" in answer
