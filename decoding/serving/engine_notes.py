"""The README of an exported engine folder: launch lines, request bodies, and what was and was not tested.

The statements about vLLM and SGLang were read in their documentation and sources in November 2026; no server was run.
"""

from __future__ import annotations

from typing import Any

_TEXT = """# A SID model for vLLM and SGLang

{family}, {sids:,} SIDs of {depth} tokens. Written by `sidtune export-engine`.

| file | what |
|---|---|
| `model.safetensors`, `config.json`, `tokenizer*` | the plain model: adapters and new token rows are merged in |
| `generation_config.json` | special tokens only. Servers take top-k, top-p and penalties from here, and those cut legal SIDs |
| `sid_grammar.ebnf` | the SIDs as a grammar over token ids, {rules:,} rules, {grammar_kb:,.0f} kB |
{reasoning_row}| `sid_trie.safetensors`, `sid_trie.json` | the same as a `SidTrie`, with the token ids of its codes |
| `sid_vocabulary.json` | token ids of the codes |

## Rules for every server

- **Send token ids, not text.** A query is a stranger's text: a server tokenises `<a_3>` in it as a SID token. sidtune's
  serializer neutralises that and makes the ids; the prompt ends where the SID begins.
- Ask for exactly {depth} new tokens, with top-k and top-p off, no penalties, no stop strings.
- The grammar must run on **xgrammar 0.1.33 or later** (`pip show xgrammar` beside the server): it uses `Token(...)`. A
  grammar of text literals would also admit a SID spelled out in several ordinary tokens, which no map knows.
- The grammar travels with each request and is compiled once per process, then cached by its text.
- These servers rank by *sampling*. For the K most probable items, which is what sidtune evaluates, use
  `sidtune serve`; see "Beam search" below.

## vLLM

```bash
vllm serve . --served-model-name sid --generation-config vllm --structured-outputs-config.backend xgrammar
```

`POST /v1/completions`:

```json
{{"model": "sid", "prompt": [1, 2, 3], "max_tokens": {depth}, "n": 20, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
 "return_token_ids": true, "structured_outputs": {{"grammar": "<text of sid_grammar.ebnf>"}}}}
```

Greedy: `"n": 1, "temperature": 0`. In Python, `SamplingParams(structured_outputs=StructuredOutputsParams(grammar=...))`.
Releases before 0.12 called the field `guided_grammar`.

## SGLang

```bash
python -m sglang.launch_server --model-path . --served-model-name sid --grammar-backend xgrammar --port 30000
```

`POST /generate`:

```json
{{"input_ids": [1, 2, 3], "sampling_params": {{"max_new_tokens": {depth}, "n": 20, "temperature": 1.0, "top_p": 1.0,
 "top_k": -1, "ebnf": "<text of sid_grammar.ebnf>"}}}}
```

{reasoning}## From answers to items

```python
import torch
from sidtune.decoding.serving.engine_export import leaves_of_tokens
from sidtune.decoding.trie import SidTrie

trie = SidTrie.from_pretrained(".")
leaves = leaves_of_tokens(trie, torch.tensor([{example}]))   # -1 would be no SID
```

## Beam search

- vLLM: the HTTP server's beam search knew no constraint for a long time (vllm#21546). `LLM.beam_search` takes
  `BeamSearchParams(structured_outputs=...)` since pull request 35022, and later sources do so over HTTP too. By its code
  it takes the 2K most probable tokens of the *whole* vocabulary for each beam and then drops the illegal ones, so no
  illegal SID comes out but legal ones can be lost, and scores are over the whole vocabulary. It is not the search that
  sidtune evaluates.
- SGLang: beam search was merged in 2026 (sglang#31626); whether it obeys `ebnf` was not found out.
- vLLM's own logits processors are loaded once per engine (`--logits-processors module:Class`). Their interface is
  another one for each of its two model runners and is marked as changing, so none is shipped.

## Tested, and not tested

Tested, in sidtune's tests with xgrammar on a CPU: the grammars compile; the mask that xgrammar computes for this kind of
tokenizer allows exactly the trie's tokens at every prefix of a catalogue, then the end token alone; the folder loads with
transformers' `from_pretrained` and gives the logits of the model before export.

**Not tested: vLLM and SGLang themselves.** Neither could be run where this was written. Launch lines, fields and
statements above come from their documentation and sources. Check the first answers with `leaves_of_tokens`.
"""

_REASONING = """## Reasoning first

`sid_reasoning_grammar.ebnf` in the same fields: free text without SID tokens, the end token, one SID. Give `max_tokens`
room for the text; the grammar sets no limit on it, so an answer that is cut off has no SID. `reason_then_search` closes
such a text by force instead.

"""


def readme(facts: dict[str, Any]) -> str:
    """The text for an export; `facts`: family, sids, depth, rules, grammar_bytes, example (token ids), reasoning."""
    row = "| `sid_reasoning_grammar.ebnf` | free text first, then a SID |\n" if facts["reasoning"] else ""
    return _TEXT.format(
        **{key: facts[key] for key in ("family", "sids", "depth", "rules", "example")},
        grammar_kb=facts["grammar_bytes"] / 1000,
        reasoning_row=row,
        reasoning=_REASONING if facts["reasoning"] else "",
    )
