"""How much of each token belongs to a part of a text, by hand."""

import torch

from flashtrace_plugin.units.shares import token_shares

TEXT = "a red box, a key"
#       0123456789012345
TOKENS = [(0, 1), (1, 5), (5, 10), (10, 12), (12, 13), (13, 16)]


def test_a_token_belongs_to_the_unit_that_has_its_visible_characters():
    shares = token_shares(TEXT, TOKENS, [[(2, 5)], [(13, 16)]])
    assert shares.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_a_token_that_crosses_the_border_is_split_by_visible_characters():
    shares = token_shares(TEXT, TOKENS, [[(2, 9)]])
    torch.testing.assert_close(shares, torch.tensor([[0, 1, 0.75, 0, 0, 0]]))


def test_white_space_alone_belongs_by_all_its_characters():
    assert token_shares(TEXT, TOKENS, [[(12, 16)]]).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert token_shares(TEXT, TOKENS, [[(13, 16)]]).tolist() == [[0, 0, 0, 0, 0, 1]]


def test_a_unit_may_fill_several_places_or_none():
    assert token_shares(TEXT, TOKENS, [[(0, 1), (11, 12)], []]).tolist() == [[1, 0, 0, 1, 0, 0], [0] * 6]


def test_units_share_a_token_they_meet_in():
    shares = token_shares(TEXT, TOKENS, [[(2, 7)], [(7, 10)]])
    torch.testing.assert_close(shares[:, 2], torch.tensor([0.25, 0.75]))


def test_without_units_or_tokens():
    assert token_shares(TEXT, TOKENS, []).shape == (0, 6)
    assert token_shares("", [], [[]]).shape == (1, 0)


def test_a_token_of_no_characters_belongs_to_nobody():
    assert token_shares(TEXT, [(3, 3)], [[(2, 5)]]).tolist() == [[0]]
