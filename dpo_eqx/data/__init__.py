"""From text and files to batches: `read`, `tokenize`, `mix`, `batches`, `pack`, `cache_reference`.

The core does not import this package, and this package does not depend on losses or steps.
"""

from ._batches.batches import Batches as Batches, batches as batches
from ._batches.buckets import (
    Buckets as Buckets,
    PackedShapes as PackedShapes,
    Shapes as Shapes,
)
from ._batches.mix import Mixture as Mixture, mix as mix
from ._batches.pack import pack as pack
from ._batches.packed_batches import packed_batches as packed_batches
from ._records.hold_out import hold_out as hold_out
from ._records.prompts import split_shared_prompt as split_shared_prompt
from ._records.read import Records as Records, read as read
from ._records.records import Form as Form
from ._reference_cache import cache_reference as cache_reference
from ._tokens.report import Report as Report
from ._tokens.store import TokenCache as TokenCache
from ._tokens.tokenize import tokenize as tokenize
from ._tokens.tokenizers import (
    ByteTokenizer as ByteTokenizer,
    Tokenizer as Tokenizer,
    load_tokenizer as load_tokenizer,
)
