"""Manifests: what released files must be, as a JSON file beside them.

Version 1, one JSON object of ASCII (RFC 8259), files sorted by path, one line a tensor::

    {"schema_version": 1,
     "folders": [str],
     "files": [{"path": str, "size": int, "sha256": hex, "format": str, "kind": str, "trust": str,
                "content_digest": "sha256:…" | null, "whole_digest": "sha256:…", "architecture": str | null,
                "golden": {"path": str, "sha256": hex} | null,
                "shards": {name: {"size": int, "sha256": hex}},
                "others": [name],
                "tensors": {name: {"dtype": str, "shape": [int], "digest": "sha256:…"}} | null}]}

Paths are relative to the manifest's folder, with ``/``, and never lead out of it.  ``folders`` are those the manifest
was made of (``"."`` is its own, which is meant where the key is missing): all that lies in them is released, so that a
checkpoint there that is not among ``files`` is one too many.  ``size`` is in bytes, of a sharded
checkpoint with its shards; ``sha256`` is of the file itself, and of an index the index alone.  Digests, and the names
of tensors, are those of `ckptkit.digests`.  ``tensors`` is ``null`` where they are folded into the content digest.
``whole_digest``, ``shards`` (named relative to the index) and ``others`` (values that are not plain tensors) are left
out where there are none.  A reader ignores keys it does not know, and refuses another version.

`records` holds its parts, `reader` reads it, `maker` makes and updates it, `at_path` from paths to a file.
"""
