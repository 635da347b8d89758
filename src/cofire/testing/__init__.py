"""Public test doubles: hypothesis strategies for specs, and network namespaces as hosts. Needs the ``dev`` extra."""
