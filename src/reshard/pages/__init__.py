"""Pages for people: one HTML file each, which loads nothing else.

page.py         what every page has: templates, what is escaped, the file
changes.py      the page of `reshard diff`
contents.py     the page of `reshard inspect`
figures.py      heat maps and histograms: plain geometry, which the templates draw
data/           the templates, their style and their script

A page is made with jinja2 (the extra `html`), which escapes whatever a checkpoint's files say. Its
script is the only one that a browser runs: the page's policy names it by its digest.
"""
