"""Report: what one run did, as a page for a browser and as Markdown -> `report.html`, `report.md`.

Nothing is imported here: the command line reads the options without loading matplotlib.
"""
