"""The native core's tiles of FP8; addresses are integers."""

def quantize(
    x: int,
    codes: int,
    scales: int,
    values: int,
    batches: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    element: int,
    power_of_two: bool,
    floor: float,
    num_threads: int,
    plain: bool = False,
) -> None: ...
def dequantize(
    codes: int,
    scales: int,
    values: int,
    batches: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    element: int,
    power_of_two: bool,
    num_threads: int,
    plain: bool = False,
) -> None: ...
