"""One self-contained HTML page of what a folder holds: interactive, offline, for every reader."""

from suture.page.gather import Found, gather
from suture.page.write import render, write_page

__all__ = ["Found", "gather", "render", "write_page"]
