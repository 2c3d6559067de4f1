"""What all kernels in Triton share, and those that are not attention's (`../attention/kernels/`).

device.py    where kernels can run        rows.py      loads and stores        nearest.py   the nearest code of each key

Importing device.py imports no triton. Where TRITON_INTERPRET=1 was set before triton came, kernels run on the CPU.
"""
