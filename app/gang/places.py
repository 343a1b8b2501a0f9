"""Which nodes run the next round, in which place, and which wait as spares."""

from collections.abc import Collection, Sequence


def assign(owners: Sequence[int], present: Collection[int]) -> list[int]:
    """The owner of each place of the next round, by node rank of torchrun; both lists hold nodes of NODES.

    Whoever has a place keeps it while it is `present`. A place whose owner is absent goes to the first spare; where
    there is none its owner has it still, and the round is run without it. Node 0 hosts torch's store, so it owns the
    first place for ever.
    """
    spares = iter(sorted(set(present) - set(owners)))
    return [owner if owner in present or not owner else next(spares, owner) for owner in owners]
