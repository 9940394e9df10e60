"""Move finished files to where they are kept and back. Nothing here can decrypt.

* There: `pushing` takes a `parcel` (what may leave) with its `card` to `hub` or `s3`; `checking` asks before.
* Back: `pulling` brings it by `hub_download` or `fetching`.
"""
