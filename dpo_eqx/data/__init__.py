"""From text and files to batches: `read`, `tokenize`, `batches`, `pack`, `cache_reference`.

The core does not import this package, and this package does not depend on losses or steps.
"""

from .batches import Batches as Batches, batches as batches
from .buckets import Buckets as Buckets, Shapes as Shapes
from .pack import pack as pack
from .read import Records as Records, read as read
from .records import Form as Form
from .reference_cache import cache_reference as cache_reference
from .report import Report as Report
from .store import TokenCache as TokenCache
from .tokenize import tokenize as tokenize
from .tokenizers import (
    ByteTokenizer as ByteTokenizer,
    Tokenizer as Tokenizer,
    load_tokenizer as load_tokenizer,
)
