"""Move finished files to where they are kept, and look whether they are safe there. Nothing here can decrypt.

* There: `pushing` takes a `parcel` (what may leave) with its `card` to `hub` or `s3`; `checking` asks before.
* Back: `pulling` brings it by `hub_download` or `fetching`.
* Closed: `lockdown` brings a `bucket` to what `policy` makes of names (`principals`, `statements`), as `planning` shows
  and `terraform` writes it.
* Open: `audit` lists `findings`, by what `contents`, `leaks` and `disguise` see in files.
"""
