"""HFReduce: all-reduce through the CPU, over shared memory in a node and a double binary tree between nodes.

Fire-Flyer (arXiv 2408.14158, IV-A), as a torch.distributed backend: ``init_process_group("hfreduce")``.
"""
