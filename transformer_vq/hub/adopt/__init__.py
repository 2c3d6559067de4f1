"""`transformer-vq adopt`: a pretrained softmax decoder becomes a VQ model, measured before, between and after.

llama.py     what is known of other people's models: settings and weights as ours
measure.py   codebooks from the model's own keys; what each layer's conversion costs
convert.py   the run folder: teacher, converted model, numbers
report.py    those numbers as a page, and pictures
"""
