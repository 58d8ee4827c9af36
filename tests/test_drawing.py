"""Drawn rows: by the hash of an id, so that no part of a table in the order of ids is favoured."""

from tasks.rlhf.drawing import draw


def test_a_draw_is_spread_over_the_ids_and_never_its_first_rows() -> None:
    taken = draw(range(10_000), 1_000)
    assert len(set(taken)) == 1_000
    halves = sum(place < 5_000 for place in taken)
    assert 430 < halves < 570  # 500, and four standard deviations of 15
    assert abs(sum(taken) / 1_000 - 5_000) < 400


def test_a_small_draw_is_a_part_of_a_larger_one_whatever_else_is_there() -> None:
    ids = [7 * place + 3 for place in range(400)]
    large = [ids[place] for place in draw(ids, 100)]
    assert [ids[place] for place in draw(ids, 10)] == large[:10]
    fewer = ids[::2]
    assert [fewer[place] for place in draw(fewer, 400)] == [id for id in (ids[place] for place in draw(ids, 400)) if id in set(fewer)]


def test_a_table_that_is_short_enough_is_taken_whole_and_any_id_is_one() -> None:
    assert sorted(draw([5, 4, 3], 9)) == [0, 1, 2]
    assert draw([], 3) == []
    assert len(draw([-1, 2**62, 0], 2)) == 2
    assert len(draw([8, 8, 8], 2)) == 2
