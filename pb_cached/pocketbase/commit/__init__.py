"""Commits: how operations are made true in PocketBase, all of them or none."""

from pb_cached.pocketbase.commit.batch import BatchPath
from pb_cached.pocketbase.commit.installation import Installation
from pb_cached.pocketbase.commit.interface import CommitPath, Operation, Refused, Reply, TooLarge, Unexplained
from pb_cached.pocketbase.commit.log import LogPath
from pb_cached.pocketbase.commit.single import SinglePath

__all__ = [
    "BatchPath",
    "CommitPath",
    "Installation",
    "LogPath",
    "Operation",
    "Refused",
    "Reply",
    "SinglePath",
    "TooLarge",
    "Unexplained",
]
