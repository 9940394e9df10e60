"""Look after the places where files are kept. Nothing here can decrypt, and nothing is sent there.

* Closed: `lockdown` brings a `bucket` to what `policy` makes of names (`principals`, `statements`), as `planning` shows
  and `terraform` writes it.
* Open: `audit` lists `findings`, by what `contents` and `leaks` see in files.
"""
