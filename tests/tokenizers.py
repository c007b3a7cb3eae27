"""A tokenizer of one token a character, for the tiny models (64 tokens) of `tests.models`, and both in a folder."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?!+-*/=()'_<>{}\n"


def tiny_tokenizer(*, bos: bool = True, eos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """bos, eos: whether it puts them around a text. pad: whether it has a pad token."""
    specials = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {token: number for number, token in enumerate((*specials, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary[token]) for token in specials]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A folder that holds the model and the tokenizer, as `model.path` wants it."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
