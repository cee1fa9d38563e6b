"""What models could hide from a look at single rows: each of these once gave rows each other's tasks."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.families import FAMILIES
from tests.support.family_inputs import Batch, images_in_text, row_with_images
from tests.support.helpers import TASKS, adapted_model, adapter_config, example_batch, logits, make_active
from tests.support.odd_models import Guided, SequenceFirst, Shuffled
from tests.support.tolerances import FLOAT64_MODEL

REFUSED = "cannot be told apart"
CLOSE = {"rtol": FLOAT64_MODEL, "atol": FLOAT64_MODEL}


def adapted(model: nn.Module, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return make_active(get_peft_model(model, adapter_config(target_modules="all-linear", **changes))).double()


def is_right(model: PeftModel, batch: Batch, run: Callable[..., Tensor] | None = None) -> bool:
    """Whether a mixed batch equals its rows; an error if it does not, and False if it is refused."""
    run = run or (lambda batch, tasks: model(**batch, tasks=tasks))
    rows = len(batch["input_ids"])
    with torch.no_grad():
        try:
            together = run(batch, [TASKS[row % 3] for row in range(rows)])
        except ValueError as error:
            if REFUSED not in str(error):
                raise
            return False
        for row in range(rows):
            one = {name: value[row : row + 1] if len(value) == rows else value for name, value in batch.items()}
            assert_close(together[row : row + 1], run(one, TASKS[row % 3]), **CLOSE)
    return True


def tokens(rows: list[list[int]]) -> Batch:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


ALIKE, CONSTANT, OTHERS = (
    tokens([[4, 5, 6, 7]] * 3),
    tokens([[5] * 4] * 3),
    tokens([[4, 9, 12, 7], [8, 20, 6, 5], [30, 11, 3, 14]]),
)


@pytest.mark.parametrize("first", [ALIKE, CONSTANT, OTHERS], ids=["alike", "constant", "others"])
def test_what_the_first_batch_says_hides_nothing(first: Batch) -> None:
    guided, shuffled = adapted(Guided().double()), adapted(Shuffled().double())
    for batch in (first, OTHERS):
        assert is_right(guided, batch)
        assert not is_right(shuffled, batch)


class Sorted(SequenceFirst):
    """Sorts rows by length, the shortest or the longest first, and puts them back."""

    def __init__(self, longest_first: bool, outlier: float = 0.0) -> None:
        super().__init__()
        self.longest_first, self.outlier = longest_first, outlier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        order = attention_mask.sum(dim=1).argsort(descending=self.longest_first, stable=True)
        x = self.embedding(input_ids[order])
        x[..., 0] += self.outlier
        return self.fc2(self.fc1(x).tanh())[order.argsort()]


@pytest.mark.parametrize("outlier", [0.0, 1e4])
@pytest.mark.parametrize("longest_first", [True, False])
def test_rows_sorted_by_length(longest_first: bool, outlier: float) -> None:
    """Also where no row of the first batch is padded, and where one value is large in all elements."""
    model = adapted(Sorted(longest_first, outlier).double())
    assert not is_right(model, OTHERS)
    padded = {name: value.clone() for name, value in OTHERS.items()}
    padded["attention_mask"][0, 2:] = 0
    assert not is_right(model, padded)


class Classes(SequenceFirst):
    """Compares tokens with classes that all rows share."""

    def forward(self, input_ids: Tensor, classes: Tensor) -> Tensor:
        return self.fc1(self.embedding(input_ids)) @ self.fc2(self.embedding(classes)).T


@pytest.mark.parametrize("number", [2, 3, 4])
def test_an_input_that_all_rows_share(number: int) -> None:
    model = adapted(Classes().double())
    with pytest.raises(ValueError, match=REFUSED):
        model(OTHERS["input_ids"], torch.arange(3, 3 + number), tasks=TASKS)


class Views(SequenceFirst):
    """Two views of each row: side by side in evaluation, one batch after the other in training."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        views = torch.stack([x, x.flip(1)], dim=0 if self.training else 1).flatten(0, 1)
        return self.fc1(views)


def test_another_order_in_training() -> None:
    model = adapted(Views().double())
    assert model(**OTHERS, tasks=TASKS).shape[0] == 6
    model = adapted(Views().double()).train()
    with pytest.raises(ValueError, match="its elements lie otherwise in training"):
        model(**OTHERS, tasks=TASKS)


def test_recordings_of_which_rows_have_several() -> None:
    """As many recordings as rows prove nothing: the model's text says how many a row has."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = Qwen2AudioConfig(
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
        | {"num_mel_bins": 8, "max_source_positions": 4},
        text_config={**text, "vocab_size": 40, "num_key_value_heads": 2},
        audio_token_index=39,
    )
    model = adapted(Qwen2AudioForConditionalGeneration(config).double().eval())
    for counts in ([1, 1, 1], [2, 1, 0]):
        ids = torch.full((3, 8), 5)
        for row, count in enumerate(counts):
            ids[row, 2 : 2 + 2 * count] = 39
        features = torch.randn(3, 8, 8, dtype=torch.float64)
        with torch.no_grad(), pytest.raises(ValueError, match=f"audio_tower.*{REFUSED}"):
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=features,
                feature_attention_mask=torch.ones(3, 8, dtype=torch.long),
                tasks=TASKS,
            )


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "qwen2-vl"])
def test_generation_from_images(name: str) -> None:
    """The tower is called before the model, with as many images as rows or not; the language model keeps rows."""
    family = FAMILIES[name]
    language = adapted(family.build(), exclude_modules=r".*(vision|visual|projector|connector|multi_modal).*")
    everything = adapted(family.build())
    batch = family.batch(3, 3)

    def run(model: PeftModel) -> Callable[..., Tensor]:
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        return lambda batch, tasks: model.generate(**batch, tasks=tasks, **options)

    together = run(language)(batch, TASKS)
    for row, task in enumerate(TASKS):
        assert torch.equal(together[row : row + 1], run(language)(family.one(batch, row), task))
    with pytest.raises(ValueError, match=REFUSED):
        run(everything)(batch, TASKS)


def test_images_beside_embeddings_of_text() -> None:
    model = adapted(FAMILIES["llava"].build())
    batch = images_in_text(3, 3)
    alone = [row_with_images(batch, row) for row in range(3)]
    assert len(alone) == 3
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
        model(inputs_embeds=embeddings, **batch, tasks=TASKS)


class AllExperts(SequenceFirst):
    """Its only expert gets all tokens of a row, and would get others."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.experts[0](self.fc1(self.embedding(input_ids)))


def test_experts_are_refused_by_name() -> None:
    model = adapted(AllExperts().double())
    with pytest.raises(ValueError, match=r"'experts.0'.*an expert gets the tokens that chose it"):
        model(**OTHERS, tasks=TASKS)


class Counting(SequenceFirst):
    """Keeps a count, a memory and its inputs' sum; draws from everything that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.memory = 0, None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(input_ids)
        self.memory = input_ids.double().mean()
        attention_mask += 1
        random.random(), np.random.rand(), torch.rand(1)
        return self.fc1(self.embedding(input_ids))


def test_nothing_that_the_model_keeps_is_changed() -> None:
    model = adapted(Counting())
    batch = {name: value.clone() for name, value in OTHERS.items()}
    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(7)
    model(**batch, tasks=TASKS)
    drawn = random.random(), np.random.rand(), float(torch.rand(1))
    base = model.get_base_model()
    assert (float(base.calls), base.seen, float(base.memory)) == (1, 3, float(batch["input_ids"].double().mean()))
    assert batch["attention_mask"].unique().tolist() == [2]
    for draw in (random.seed, np.random.seed, torch.manual_seed):
        draw(7)
    random.random(), np.random.rand(), torch.rand(1)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(1)))


def test_threads_that_learn_at_once() -> None:
    batch = example_batch("bert", labels=False)
    tasks = [TASKS[row % 3] for row in range(4)]
    expected = logits(adapted_model("bert"), batch, tasks=tasks)
    model = adapted_model("bert")
    meet, found = threading.Barrier(4), []

    def run() -> None:
        meet.wait()
        found.append(logits(model, batch, tasks=tasks))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_an_argument_that_may_keep_a_state_is_not_run() -> None:
    class Memory:
        pass

    class Remembering(SequenceFirst):
        def forward(self, input_ids: Tensor, memory: Memory) -> Tensor:
            return self.fc1(self.embedding(input_ids))

    with pytest.raises(ValueError, match="memory is a Memory, which may keep a state"):
        adapted(Remembering().double())(OTHERS["input_ids"], memory=Memory(), tasks=TASKS)
