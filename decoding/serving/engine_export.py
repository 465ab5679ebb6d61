"""A folder that vLLM and SGLang load: the plain model, its trie, and the trie as a grammar for their xgrammar backend.

Those servers constrain a request by a grammar, and theirs is a grammar over *text*: with the literal `"<a_12>"` a model
may also write `<`, `a`, `_`, `1`, `2`, `>` one by one, which is no SID to anyone. So the grammar here is one over token
ids, by xgrammar's `Token(...)` (since its release 0.1.33), and its legal sets are those of the trie at every prefix,
which the tests check against xgrammar itself. The servers were not available where this was written: what their
documentation and code say is in the README of the folder, which names what is untested.

Size: one rule per first code; codes with the same continuations share one alternative. 100,000 random SIDs of 3 x 256
codes make 1.4 MB, which xgrammar 0.2.8 compiles in 1.3 s on one CPU core; of 4 x 256 codes 3.1 MB and 25 s. No paper is
involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.serving.engine_notes import readme
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.saving import merge_and_save

GRAMMAR_FILE, REASONING_GRAMMAR_FILE, README_FILE = "sid_grammar.ebnf", "sid_reasoning_grammar.ebnf", "README.md"
MAX_SIDS = 100_000


def sid_grammar(
    trie: SidTrie,
    sid_token_ids: np.ndarray | Tensor | None = None,
    *,
    max_sids: int = MAX_SIDS,
    end_token_id: int | None = None,
    never: Sequence[int] = (),
) -> str:
    """The trie as a grammar in xgrammar's EBNF, over token ids; a filtered trie gives the allowed SIDs only.

    Args:
        trie: legal SIDs. sid_token_ids: (sum of level sizes,) token ids; default those the trie was bound to.
        max_sids: refuse more than that, because a server reads the whole text with a request.
        end_token_id: ends free text before the SID, for example the token of `</think>`. Default: the SID comes first.
        never: tokens that are not allowed in the free text besides the SID tokens; give EOS at least.

    Raises:
        ConfigError: too many SIDs, none, or `end_token_id` is a SID token. DataError: token ids that do not fit.
    """
    count = trie.num_allowed_leaves
    if not 0 < count <= max_sids:
        raise ConfigError(
            f"A grammar can hold 1 to {max_sids:,} SIDs, but the trie allows {count:,}; restrict the trie, raise "
            "max_sids if your server takes such long requests, or serve with `sidtune serve`."
        )
    levels = [tokens.tolist() for tokens in trie.level_tokens(sid_token_ids)]
    rules = _rules(trie.to("cpu"), levels)
    if end_token_id is None:
        return "\n".join(["root ::= sid", *rules]) + "\n"
    every = {token for tokens in levels for token in tokens}
    if end_token_id in every:
        raise ConfigError(f"end_token_id {end_token_id} is a SID token; give the token that ends the reasoning.")
    barred = ",".join(map(str, sorted(every | set(never) | {end_token_id})))
    root = [f"root ::= text Token({end_token_id}) sid", f"text ::= ExcludeToken({barred})*"]
    return "\n".join([*root, *rules]) + "\n"


def _rules(trie: SidTrie, levels: list[list[int]]) -> list[str]:
    """Rules bottom up: `bodies` holds what may follow each node of a level, as text or as the name of a rule.

    Many small rules compile slowly, so only the subtrees below first codes are rules; all below stands in parentheses.
    """
    codes, start = trie.codes.tolist(), trie.child_start.tolist()
    alive = None if trie.alive is None else trie.alive.tolist()
    bodies: dict[int, str] = {}
    names: dict[str, str] = {}
    for level in range(trie.depth - 1, -1, -1):
        above: dict[int, str] = {}
        for node in range(trie.level_starts[level], trie.level_starts[level + 1]):
            if alive is not None and not alive[node]:
                continue
            children = [n for n in range(start[node], start[node + 1]) if alive is None or alive[n]]
            body = _alternatives([levels[level][codes[n]] for n in children], [bodies.get(n, "") for n in children])
            if level == 1:
                body = names.setdefault(body, f"s{len(names)}")
            above[node] = f"({body})" if level > 1 and " | " in body else body
        bodies = above
    return [f"sid ::= {bodies[0]}", *(f"{name} ::= {body}" for body, name in names.items())]


def _alternatives(tokens: list[int], followers: list[str]) -> str:
    """Tokens with the same continuation share one alternative."""
    groups: dict[str, list[int]] = {}
    for token, follower in zip(tokens, followers, strict=True):
        groups.setdefault(follower, []).append(token)
    return " | ".join(f"Token({','.join(map(str, group))}) {then}".rstrip() for then, group in groups.items())


def leaves_of_tokens(trie: SidTrie, token_ids: Tensor, sid_token_ids: np.ndarray | Tensor | None = None) -> Tensor:
    """What a server answered: (..., depth) token ids give (...,) int64 leaves of the trie, -1 for what is no legal SID.

    Raises DataError when the last dimension is not the depth of the trie.
    """
    if token_ids.shape[-1:] != (trie.depth,):
        raise DataError(
            f"A SID has {trie.depth} tokens, but the answers have the shape {tuple(token_ids.shape)}; cut them to the "
            "tokens of the SID."
        )
    codes = torch.full(token_ids.shape, -1, dtype=torch.int64, device=trie.device)
    for level, tokens in enumerate(trie.level_tokens(sid_token_ids)):
        given = token_ids[..., level].to(trie.device)
        order = tokens.argsort()
        place = torch.searchsorted(tokens[order], given.contiguous()).clamp(max=len(tokens) - 1)
        codes[..., level] = order[place].where(tokens[order[place]] == given, -1)
    nodes = trie.find(codes)
    return (nodes - trie.level_starts[trie.depth]).where(nodes >= 0, -1)


def export_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    trie: SidTrie,
    folder: str | Path,
    *,
    max_sids: int = MAX_SIDS,
    end_token_id: int | None = None,
) -> dict[str, Any]:
    """Writes the folder of a server: model, tokenizer, generation settings, trie, grammars and a README of commands.

    Give the scratch folder of `write_folder`.

    Args:
        model: decoder-only model; LoRA and trained rows are merged into it, so it is consumed.
        tokenizer, vocabulary, trie: what belongs to it; the trie may be filtered.
        max_sids: largest number of SIDs in a grammar.
        end_token_id: also write the grammar with free text before the SID, which ends with this token.

    Returns:
        Facts about the export: `sids`, `depth`, `grammar_bytes`, `rules`.

    Raises:
        ConfigError: an encoder-decoder, too many SIDs, no EOS token. DataError: parts that do not belong together.
            Nothing is written then.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError("vLLM and SGLang serve decoder-only models this way; serve this one with `sidtune serve`.")
    if tuple(trie.level_sizes) != tuple(vocabulary.level_sizes):
        raise DataError(
            f"The trie has levels of {list(trie.level_sizes)} codes, the vocabulary of {list(vocabulary.level_sizes)}; "
            "use the semantic IDs the model was extended with."
        )
    vocabulary.check(tokenizer, rows=model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no EOS token, so a server cannot end an answer; set tokenizer.eos_token.")
    bound = trie.bind(vocabulary.sid_token_ids)
    grammars = {GRAMMAR_FILE: sid_grammar(bound, max_sids=max_sids)}
    if end_token_id is not None:
        never = [token for token in tokenizer.all_special_ids if token != end_token_id]
        grammars[REASONING_GRAMMAR_FILE] = sid_grammar(bound, max_sids=max_sids, end_token_id=end_token_id, never=never)
    folder = Path(folder)
    plain = merge_and_save(model, vocabulary, tokenizer, folder)
    bound.save_pretrained(folder)
    for name, text in grammars.items():
        (folder / name).write_text(text, encoding="utf-8")
    facts = {
        "sids": trie.num_allowed_leaves,
        "depth": trie.depth,
        "grammar_bytes": len(grammars[GRAMMAR_FILE]),
        "rules": grammars[GRAMMAR_FILE].count("::="),
    }
    example = vocabulary.token_ids(bound.leaf_codes(_first_allowed(bound))[None].cpu().numpy())[0].tolist()
    text = readme(
        {**facts, "family": plain.config.model_type, "example": example, "reasoning": end_token_id is not None}
    )
    (folder / README_FILE).write_text(text, encoding="utf-8")
    return facts


def _first_allowed(trie: SidTrie) -> Tensor:
    leaves = torch.arange(trie.num_leaves, device=trie.device)
    return leaves[0] if trie.alive is None else leaves[trie.alive[trie.level_starts[trie.depth] :]][0]
