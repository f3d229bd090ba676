"""The one cache: what it keeps, and what it forgets first."""

from __future__ import annotations

from unike.system.cache import BoundedCache


def kept(cache: BoundedCache[str, int], keys: str) -> str:
    """Those of the keys that are there, without asking for them."""
    return "".join(key for key in keys if key in cache._values)


def test_what_was_not_asked_for_longest_goes_first() -> None:
    cache = BoundedCache[str, int](2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (kept(cache, "abc"), len(cache)) == ("ac", 2)
    assert cache.get("b") is None
    cache.put("a", 4)
    cache.put("d", 5)
    assert kept(cache, "abcd") == "ad"
    assert cache.get("a") == 4


def test_sizes_count_and_the_newest_value_stays_however_large() -> None:
    cache = BoundedCache[str, int](10, lambda size: size)
    for key, size in (("a", 4), ("b", 4), ("c", 4)):
        cache.put(key, size)
    assert (kept(cache, "abc"), cache.size) == ("bc", 8)
    cache.put("b", 6)
    assert (kept(cache, "abc"), cache.size) == ("bc", 10)
    cache.put("d", 100)
    assert (kept(cache, "abcd"), cache.size) == ("d", 100)
    cache.put("e", 1)
    assert (kept(cache, "abcde"), cache.size) == ("e", 1)
    cache.clear()
    assert (len(cache), cache.size) == (0, 0)


def test_nothing_is_a_limit_too() -> None:
    cache = BoundedCache[str, int](0, lambda size: size)
    cache.put("a", 4)
    cache.put("b", 4)
    assert kept(cache, "ab") == "b"
