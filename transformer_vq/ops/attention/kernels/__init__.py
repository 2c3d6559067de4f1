"""Fused VQ attention in Triton, one idea a file. The backend that launches them: `../triton.py`; loads and
stores: `../../kernels/rows.py`.

prefix.py    what the cache holds at each block: sums by code, then running sums over blocks
forward.py   o and logsumexp        strip.py  logits of exact keys, the parts of a strip
queries.py   gradient of queries and bias
keys.py      gradient of keys and values
sweep.py     gradient that reaches values through the cache: one sweep over the blocks, from the last to the first
tiles.py     sizes by device, widths and type            plan.py   a call

Nothing here uses atomics: every number is written once, by one program, and sums have a fixed order.
Letters as in the other backends; C is how often the cache is renewed, in tokens. Logits are in base 2.
Importing these modules imports triton; where TRITON_INTERPRET=1 was set before, they run on the CPU.
"""
