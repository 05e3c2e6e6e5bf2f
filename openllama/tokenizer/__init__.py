"""Text to token ids and back. With the shipped model's tokenizer:

    text     "To be</s>龘"
    tokens   To  ▁be  </s>  <0xE9> <0xBE> <0x98>    tokenize: sentencepiece's pieces, special tokens cut out before
    ids      400 308   2     237    194    156      encode: numbers, with bos before or eos behind them if wanted
    text     " To be</s>龘"                          decode: pieces joined; the first space is a habit of HF's

A piece writes a space as "▁", and what no piece covers is spelt in bytes. Ids and text are those of the
(slow) ``LlamaTokenizer.from_pretrained`` of transformers 4.31.0 on the same folder. Everything wrong with
an argument or a file is a ``TokenizerError``. Reading order:

tokenizer   the three arrows above, and the calls that users make
vocabulary  which token has which id, and which tokens are special
batches     several texts cut and padded to one length
files       tokenizer.model and the JSON files beside it
stream      text of ids that come one at a time
checks      arguments that cannot be right
"""

from openllama.tokenizer.batches import Encoding
from openllama.tokenizer.stream import StreamDecoder
from openllama.tokenizer.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.vocabulary import AddedToken

__all__ = ["AddedToken", "Encoding", "OpenLlamaTokenizer", "StreamDecoder"]
