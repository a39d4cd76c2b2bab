"""What a model learned, as pictures (paper, section 4.5 and appendices D.7 and D.8), one file a figure.

Each file has the figure's arithmetic, which needs no matplotlib, and a ``draw`` that does.
"""
