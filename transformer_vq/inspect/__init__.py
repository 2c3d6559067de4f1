"""What a trained model's codes mean: which tokens they stand for, where attention goes, what `rotation` would turn.

reading.py   a model reads a text in pieces while every layer is listened to
codes.py     codes as words: their tokens, in context
spelling.py  tokens as text that can be seen
numbers.py   all numbers of the page, as one JSON object
pictures.py  the figures; colours.py: of codes by their place on the map, of the page in light and dark
page.py      one HTML file from those
"""
