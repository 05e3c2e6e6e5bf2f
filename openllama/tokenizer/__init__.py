"""Text to token ids and back. With the shipped model's tokenizer:

    text     "To be</s>龘"
    tokens   To  ▁be  </s>  <0xE9> <0xBE> <0x98>    tokenize: cuts special tokens out, the rest into pieces
    ids      400 308   2     237    194    156      encode: ids of the tokens; settings add bos or eos
    text     " To be</s>龘"                          decode: joins the pieces; as in HF with a space in front

In a piece, "▁" is a space. Characters without a piece become byte tokens. Ids and text equal those of the
(slow) ``LlamaTokenizer.from_pretrained`` of transformers 4.31.0 on the same folder. A wrong argument or a
broken file raises ``TokenizerError``. Reading order:

tokenizer   encode, decode, and the other public calls
vocabulary  which token has which id, and which tokens are special
tokens      text to tokens
offsets     where in a text its tokens lie
batches     truncation, padding, masks and tensors
template    the format of conversations
files       tokenizer.model and the JSON files of its folder
stream      decoding ids that arrive one at a time
checks      checks of arguments
"""

from openllama.tokenizer.batches import Encoding
from openllama.tokenizer.stream import StreamDecoder
from openllama.tokenizer.tokenizer import OpenLlamaTokenizer
from openllama.tokenizer.vocabulary import AddedToken

__all__ = ["AddedToken", "Encoding", "OpenLlamaTokenizer", "StreamDecoder"]
