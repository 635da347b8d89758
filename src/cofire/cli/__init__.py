"""The ``cofire`` command: one module per stage, each with ``register(app)``.

Importing any module of this package loads neither torch nor numpy: a command imports what it needs when it runs.
"""
