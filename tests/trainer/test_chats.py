"""Chats become prompts and completions."""

import pytest
from datasets import Dataset, DatasetDict

from hyperadapt.trainer import split_chats

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_the_last_message_is_the_completion() -> None:
    rows = split_chats(Dataset.from_list([{"talk": [*CHAT, *CHAT], "id": 7}, {"talk": CHAT, "id": 8}]), "talk")
    assert rows.to_list() == [
        {"id": 7, "prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]},
        {"id": 8, "prompt": CHAT[:1], "completion": CHAT[1:]},
    ]


def test_what_is_no_chat_is_refused_with_its_row() -> None:
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}])
    with pytest.raises(ValueError, match=r"Row 1 ends with a message of the role 'user'.* Drop what follows it"):
        split_chats(rows)
    with pytest.raises(ValueError, match=r"no column 'chats', only \['messages'\]"):
        split_chats(rows, "chats")
    with pytest.raises(TypeError, match="dataset is a DatasetDict, but must be a "):
        split_chats(DatasetDict(train=rows))
