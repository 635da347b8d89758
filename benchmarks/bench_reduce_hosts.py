"""All-reduce between hosts at a limited rate, against the wire's bound and against gloo's own all-reduce.

Hosts are network namespaces (``cofire.testing.hosts``), one process each, so it needs root. All algorithms run in turn
in the same processes, on the same connections' rate. A time is that of the slowest node. The bound of an algorithm is
what its busiest node sends or receives, over the rate of its wire, headers not counted; the last column compares with
the least of these bounds, that of the ring. CPU seconds are those of all nodes together, per all-reduce.

    .venv/bin/python benchmarks/bench_reduce_hosts.py
    .venv/bin/python benchmarks/bench_reduce_hosts.py --hosts 8 --gigabits 0.2 --mebibytes 16
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ALGORITHMS = ("double_tree", "ring", "auto", "gloo")
PORT = 29400
TIMEOUT_S = 120.0


class Slices:
    """The chunks of a tensor whose node has one rank."""

    def __init__(self, tensor: Any, chunk_count: int) -> None:
        self.parts = tensor.split(chunk_count)
        self.num_chunks = self.num_slots = len(self.parts)

    def buffer(self, chunk: int) -> Any:
        return self.parts[chunk]

    def wait_reduced(self, chunk: int) -> None:
        pass

    def publish(self, chunk: int) -> None:
        pass

    def mark_sent(self, chunk: int) -> None:
        pass


class Worker:
    """One node: gloo's process group and our exchange, side by side."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        from cofire.collectives.between_nodes import NodeExchange
        from cofire.collectives.transport import FailureBoard, Transport
        from cofire.testing.hosts import INTERFACE

        torch.set_num_threads(1)
        self.options, self.node, self.num_nodes = options, options.worker, options.hosts[0]
        store = TCPStore(options.address, PORT, None, self.node == 0, timedelta(seconds=TIMEOUT_S))
        settings = ProcessGroupGloo._Options()
        settings._timeout = timedelta(seconds=TIMEOUT_S)
        settings._devices = [ProcessGroupGloo.create_device(interface=INTERFACE)]
        self.gloo = ProcessGroupGloo(PrefixStore("gloo", store), self.node, self.num_nodes, settings)
        transport = Transport.connect(
            PrefixStore("cofire", store),
            self.node,
            self.num_nodes,
            TIMEOUT_S,
            num_connections=options.connections,
            interface=INTERFACE,
        )
        self.exchange = NodeExchange(transport, FailureBoard(store))
        self.store = store
        self.sequence = 0
        self.programs: dict[str, Any] = {}

    def all_reduce(self, algorithm: str, tensor: Any) -> None:
        if algorithm == "gloo":
            self.gloo.allreduce([tensor]).wait()
            return
        from cofire.collectives.between_nodes import Operation
        from cofire.collectives.elements import Element, Op
        from cofire.collectives.schedule import all_reduce_program
        from cofire.collectives.shm import Kind

        if algorithm not in self.programs:
            self.programs[algorithm] = all_reduce_program(algorithm, self.num_nodes, self.node)
        program = self.programs[algorithm]
        count = self.options.chunk_kib * 256
        operation = Operation(
            self.sequence, Kind.ALL_REDUCE, Element.F32, Op.SUM, tensor.numel(), 0, count, program.period
        )
        self.sequence += 1
        self.exchange.run(program, Slices(tensor, count), operation, time.monotonic() + TIMEOUT_S)

    def measure(self, algorithm: str, tensor: Any) -> tuple[float, float]:
        """Return seconds of the slowest node, and CPU seconds of all."""
        import torch
        from torch.distributed import AllreduceOptions, ReduceOp

        chosen = self.options.chosen if algorithm == "auto" else algorithm
        tensor.fill_(self.node + 1)
        self.gloo.barrier().wait()
        cpu_s, began_s = time.process_time(), time.perf_counter()
        self.all_reduce(chosen, tensor)
        took = torch.tensor([time.perf_counter() - began_s, 0.0], dtype=torch.float64)
        cpu = torch.tensor([time.process_time() - cpu_s], dtype=torch.float64)
        right = self.num_nodes * (self.num_nodes + 1) / 2
        if not bool((tensor == right).all()):
            raise SystemExit(f"{algorithm}: wrong sum on node {self.node}")
        slowest = AllreduceOptions()
        slowest.reduceOp = ReduceOp.MAX
        self.gloo.allreduce([took], slowest).wait()
        self.gloo.allreduce([cpu]).wait()
        return float(took[0]), float(cpu[0])

    def run(self) -> None:
        import torch

        tensor = torch.empty(self.options.mebibytes << 18)
        for number in range(self.options.repeats + 1):
            for algorithm in self.options.algorithms:
                took_s, cpu_s = self.measure(algorithm, tensor)
                if number and self.node == 0:
                    print(algorithm, took_s, cpu_s, flush=True)
        self.gloo.barrier().wait()
        self.exchange.close()


def bounds_s(num_hosts: int, size_bytes: float, rate_bytes_per_s: float) -> dict[str, float]:
    from cofire.collectives.schedule import all_reduce_round, busiest_node_bytes, choose_algorithm

    found: dict[str, float] = {}
    for algorithm in ("double_tree", "ring"):
        messages = all_reduce_round(algorithm, num_hosts, size_bytes)
        found[algorithm] = busiest_node_bytes(messages) / rate_bytes_per_s
    found["auto"] = found[choose_algorithm(num_hosts, size_bytes, rate_bytes_per_s, 1e-4)]
    found["gloo"] = found["ring"]
    return found


def compare(num_hosts: int, options: argparse.Namespace) -> None:
    from cofire.collectives.schedule import choose_algorithm
    from cofire.testing.hosts import Hosts

    rate, size = options.gigabits * 125e6, float(options.mebibytes << 20)
    chosen = choose_algorithm(num_hosts, size, rate, 1e-4)
    command = [sys.executable, str(Path(__file__).resolve()), "--hosts", str(num_hosts), "--chosen", chosen]
    for name in ("mebibytes", "repeats", "chunk_kib", "connections"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--algorithms", *options.algorithms]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Hosts(num_hosts, rate) as hosts:
        workers = [
            hosts.start(
                node,
                [*command, "--worker", str(node), "--address", hosts.address(0)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for node in range(num_hosts)
        ]
        lines = workers[0].communicate()[0].splitlines()
        if any(worker.wait() for worker in workers):
            raise SystemExit(f"a node failed: exit codes {[worker.returncode for worker in workers]}")
    times: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        algorithm, took_s, cpu_s = line.split()
        times.setdefault(algorithm, []).append((float(took_s), float(cpu_s)))
    bound = bounds_s(num_hosts, size, rate)
    for algorithm, found in times.items():
        took = [took_s for took_s, _ in found]
        low, median, high = statistics.quantiles(took, n=4)
        label = f"auto ({chosen})" if algorithm == "auto" else algorithm
        cpu = statistics.median(cpu_s for _, cpu_s in found)
        print(
            f"| {num_hosts} | {label} | {median:.3f} ({low:.3f} to {high:.3f}) | {bound[algorithm]:.3f} "
            f"| {bound[algorithm] / median:.1%} | {bound['ring'] / median:.1%} | {cpu:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gigabits", type=float, default=1.0, help="per second, of each host, in each direction")
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-kib", type=int, default=256)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--chosen", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        Worker(options).run()
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()}\n"
        f"{options.mebibytes} MiB fp32, {options.gigabits:g} Gbit/s per host and direction, chunks of "
        f"{options.chunk_kib} KiB, {options.connections} connections, {options.repeats} repeats, measured\n\n"
        "| hosts | algorithm | median s (quartiles) | bound s | of its bound | of the ring's bound | CPU s |\n"
        "|---|---|---|---|---|---|---|"
    )
    for num_hosts in options.hosts:
        compare(num_hosts, options)


if __name__ == "__main__":
    main()
