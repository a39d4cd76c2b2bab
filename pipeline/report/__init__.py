"""Runs on one page (``page.py``), and as tables on the terminal: one file for each thing that is shown."""
