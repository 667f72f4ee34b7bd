"""Self-contained HTML pages: one file that opens from anywhere, loads nothing, and runs nothing of a checkpoint's.

A page is a frame, its data, and the scripts that show them.  All that comes from a checkpoint is in the data: JSON
elements that no browser runs.  The scripts of this folder read them and put texts into the page as texts.

- `frame` makes a page of its elements; ``page.css``, ``page.js`` (frame, findings, texts), ``table.js`` (tables of any
  length) and ``charts.js`` (treemap and others, drawn by plotly.js) are those of every page.
- Each kind of page has a script of its own, and a module that makes its elements of a document: `inspected` and
  ``inspect.js``, `reported` and ``reported.js``.
"""
