"""The fit of a checkpoint's tensors onto a base model's, name for name and shape for shape."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reshard.core.arrangement import Arrangement, Whole
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Equal
from reshard.errors import NamesError
from reshard.naming import ties
from reshard.naming.assemble import Assembler
from reshard.naming.judge import FitOptions, Verdict
from reshard.naming.layouts import Piece
from reshard.naming.mismatch import refuse
from reshard.naming.name_map import NameMap, Resize
from reshard.naming.schema import Schema, is_unheld, says_tied, stating_levels, text_config
from reshard.naming.search import (
    Candidate,
    Sources,
    search,
    sources,
)


def fit(
    entries: Mapping[str, Entry],
    schema: Schema,
    *,
    options: FitOptions | None = None,
    equal: Equal | None = None,
) -> NameMap:
    """Find the one map of the checkpoint's tensors onto the base's.

    `equal` is called for a head that may be tied, with two entries of one shape, and only where
    their bytes are not the same bytes already. Without it such pairs are taken to be equal and
    listed in `NameMap.undecided`.

    Raises `NamesError` where there is no map, with what is missing and unexpected, or where there
    are several.
    """
    options = options or FitOptions()
    if options.prefix and not options.prefix.endswith("."):
        options = replace(options, prefix=f"{options.prefix}.")
    found = sources(entries, options.prefix)
    candidate = search(found, schema, options)
    if not candidate.complete:
        raise refuse(candidate, _is_chosen(options))
    return _Fitting(entries, schema, found, candidate, equal, options).result()


class _Fitting:
    """The work that is left once the map is known: tensors, heads, vocabulary, report."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        schema: Schema,
        found: Sources,
        candidate: Candidate,
        equal: Equal | None,
        options: FitOptions,
    ) -> None:
        self._options = options
        self._from_base: dict[str, str] = {}
        self._tied_to: dict[str, str] = {}
        self._own_origins: dict[str, str] = {}
        self._owners = found.owners
        self._by_name = {clean: entries[own] for clean, own in found.owners.items()}
        self._config = schema.config
        self._candidate = candidate
        self._equal = equal
        self._tied: dict[str, str] = {}
        self._patches: dict[str, object] = {}
        self._undecided: list[tuple[str, str]] = []
        self._findings: list[Finding] = []

    def result(self) -> NameMap:
        outputs = self._outputs()
        written = self._copy_twins(outputs)
        self._judge_twins(outputs, written)
        dropped = self._sort_dropped(written)
        self._leave_heads_behind(outputs)
        self._mention_unheld()
        resized = self._resize()
        candidate = self._candidate
        return NameMap(
            outputs=outputs,
            origins={**self._origins(), **self._own_origins},
            prefix=candidate.prefix,
            rules=_rules(candidate),
            tied=self._tied,
            filled=self._base_names(Verdict.FILLED),
            from_base=self._from_base,
            tied_to=self._tied_to,
            left_out=self._base_names(Verdict.LEFT_OUT),
            dropped=dropped,
            resized=resized,
            config_patches=self._patches,
            undecided=tuple(self._undecided),
            findings=tuple(self._findings),
        )

    def _outputs(self) -> dict[str, Arrangement]:
        """The base's tensors that the source holds."""
        have = self._candidate.source.pieces
        wanted: dict[str, list[tuple[Piece, Piece]]] = {}
        absent: dict[str, str] = {}
        for hub, piece in self._candidate.base.pieces.items():
            if hub in have:
                wanted.setdefault(piece.name, []).append((piece, have[hub]))
            else:
                absent[piece.name] = hub
        for name in wanted.keys() & absent.keys():
            raise NamesError(
                f"the checkpoint holds a part of it only: {absent[name]!r} is missing.",
                tensor=name,
                missing=(name,),
            )
        shapes = {clean: entry.spec.shape for clean, entry in self._by_name.items()}
        assembler = Assembler(shapes, self._owners)
        return {name: assembler.arrange(pieces) for name, pieces in wanted.items()}

    def _origins(self) -> dict[str, str]:
        """Which tensors are one of the source's, complete and not transposed."""
        have = self._candidate.source.pieces
        origins = {}
        for hub, piece in self._candidate.base.pieces.items():
            source = have.get(hub)
            if source is None or piece.expert is not None or source.expert is not None:
                continue
            if piece.swapped == source.swapped:
                origins[piece.name] = self._owners[source.name]
        return origins

    def _copy_twins(self, outputs: dict[str, Arrangement]) -> dict[str, str]:
        """Write what the base stores under a name that the source has no tensor of.

        Returns the tensors that are written by their own hub names, and the copied ones' twins.
        """
        have, want = self._candidate.source.pieces, self._candidate.base.pieces
        written = {hub: hub for hub in want if hub in have}
        for hub in self._candidate.of(Verdict.COPIED):
            twin = ties.twin_of(hub, have)
            if twin is not None:
                name = want[hub].name
                own = self._owners[have[twin].name]
                outputs[name] = Whole(own)
                written[twin] = hub
                if ties.is_head(twin):
                    message = (
                        f"{name!r} is read from {own!r}: the base's config ties them, "
                        "and the checkpoint holds one."
                    )
                    self._findings.append(Finding("tied-twin-copied", message, subject=name))
                self._part_from_updated(outputs, hub, twin)
        return written

    def _part_from_updated(self, outputs: dict[str, Arrangement], hub: str, twin: str) -> None:
        """Of a tied pair that the source stores once, untie the head where one is updated."""
        if self._candidate.source.pieces[twin].name not in self._options.updated:
            return
        if ties.is_head(hub):
            self._say_untied(self._candidate.base.pieces[hub].name, "it has no update")
        elif ties.is_head(twin) and twin not in self._candidate.base.pieces:
            self._untie(outputs, twin)

    def _judge_twins(self, outputs: dict[str, Arrangement], written: Mapping[str, str]) -> None:
        """Compare what the base or its config says is one tensor, and the source stores twice.

        Raises `NamesError` where the two differ and neither is an output head: then no file and no
        config can state that they are two.
        """
        candidate = self._candidate
        have, here = candidate.source.pieces, candidate.base_view.name_here
        for hub in candidate.of(Verdict.TWIN):
            if hub in written:
                continue
            twin = ties.twin_of(hub, written)
            if twin is not None and self._are_equal(hub, twin):
                self._tied[here(hub)] = here(written[twin])
            elif ties.embedding_of(hub, candidate.base.pieces) is not None:
                # One whose embedding is the base's was trained apart, else it would stand for it.
                self._untie(outputs, hub)
            elif twin is None:
                raise refuse(candidate, _is_chosen(self._options))
            else:
                raise NamesError(
                    f"it differs from {have[twin].name!r}; the base stores one tensor for both.",
                    tensor=have[hub].name,
                    unexpected=(have[hub].name,),
                )
        for hub in candidate.of(Verdict.MATCHED) if says_tied(self._config) else ():
            embedding = ties.embedding_of(hub, {**candidate.base.pieces, **have})
            if embedding is None or written[hub] == embedding:
                continue
            if embedding not in have or not self._are_equal(hub, embedding):
                self._untie(outputs, hub)

    def _untie(self, outputs: dict[str, Arrangement], hub: str) -> None:
        """Write the head as a separate tensor, and make the config say so."""
        name = self._candidate.base_view.name_here(hub)
        own = self._owners[self._candidate.source.pieces[hub].name]
        outputs[name] = Whole(own)
        base = self._candidate.base.pieces
        if hub not in base:
            self._own_origins[name] = own
            embedding = ties.embedding_of(hub, base)
            if embedding is not None:
                self._tied_to[name] = base[embedding].name
        self._say_untied(name, "it is written")

    def _say_untied(self, head: str, what: str) -> None:
        for level in stating_levels(self._config):
            self._patches[f"{level}tie_word_embeddings"] = False
        message = (
            f"{head!r} differs from the embedding that the base ties it to: {what}, and the config "
            "says so."
        )
        self._findings.append(Finding("head-untied", message, subject=head))

    def _leave_heads_behind(self, outputs: dict[str, Arrangement]) -> None:
        """If the source lacks a head whose embedding was trained separately, the head stays the
        base's; if adapters update the embedding, the head is the embedding before the update.

        Raises `NamesError` where the base is not to be copied, or has another vocabulary.
        """
        if not says_tied(self._config) or self._options.headless:
            return
        candidate, options = self._candidate, self._options
        have, want = candidate.source.pieces, candidate.base.pieces
        heads = ties.missing_heads(have, self._config.get("model_type"))
        for hub, embedding in heads.items():
            piece = have[embedding]
            apart = piece.name in options.untied
            if embedding not in want or hub in candidate.of(Verdict.COPIED):
                continue
            name = candidate.base_view.name_here(hub)
            if piece.name in options.updated and not apart:
                outputs[name] = Whole(self._owners[piece.name])
                self._say_untied(name, "it has no update")
            elif apart:
                self._take_head(name, piece, want[embedding])
                if hub not in want:
                    self._from_base[name] = want[embedding].name
                self._say_untied(name, "it is the base's")

    def _take_head(self, name: str, embedding: Piece, base: Piece) -> None:
        """Check that a head can be the base's. Raises `NamesError`."""
        fits = base.shape == embedding.shape
        if self._options.fill_from_base and fits:
            return
        raise NamesError(
            f"{embedding.name!r} was trained separately from the head that the base ties it to, "
            f"and "
            f"the checkpoint does not hold the head, of shape {embedding.shape}.",
            missing=(name,),
            hint="Take it from the base: --fill-from-base."
            if fits
            else f"The base's has shape {base.shape}: save the head too, with the whole model.",
        )

    def _are_equal(self, hub: str, twin: str) -> bool:
        """Whether two of the source's tensors hold the same values."""
        have = self._candidate.source.pieces
        one, other = self._by_name[have[hub].name], self._by_name[have[twin].name]
        updated = self._options.updated
        if updated.get(have[hub].name) != updated.get(have[twin].name):
            return False
        if one.fragments == other.fragments:
            return True
        if not (one.fragments and other.fragments):
            return one.spec.shape == other.spec.shape  # the base's, which ties them
        if self._equal is None:
            self._undecided.append((one.spec.name, other.spec.name))
            return True
        return self._equal(one, other)

    def _sort_dropped(self, written: Mapping[str, str]) -> tuple[str, ...]:
        """Record what is not written: other names of written tensors are ties; the rest is
        returned."""
        candidate = self._candidate
        have = candidate.source.pieces
        stores = {
            self._by_name[have[hub].name].spec.name: candidate.base_view.name_here(stored)
            for hub, stored in written.items()
        }
        dropped = list(candidate.source.allowed)
        for hub in candidate.of(Verdict.DROPPED):
            name = have[hub].name
            if candidate.base_view.name_here(hub) in self._own_origins:
                continue
            stored = stores.get(self._by_name[name].spec.name)
            if stored is None:
                dropped.append(name)
            else:
                self._tied[candidate.base_view.name_here(hub)] = stored
        return tuple(dict.fromkeys(dropped))

    def _mention_unheld(self) -> None:
        filled = self._base_names(Verdict.FILLED)
        count = sum(is_unheld(name, self._config) for name in filled)
        if count:
            message = (
                f"{count} tensors of layers that no live module holds (multi-token prediction) "
                "are the base's, untrained."
            )
            self._findings.append(Finding("untrained-layers", message))

    def _resize(self) -> tuple[Resize, ...]:
        """Tensors with another number of vocabulary rows, which the config must then state."""
        want, have = self._candidate.base.pieces, self._candidate.source.pieces
        hubs = (*self._candidate.of(Verdict.RESIZED), *self._candidate.of(Verdict.COPIED))
        resized = []
        for hub in hubs:
            name, base_rows = want[hub].name, want[hub].shape[0]
            stored = hub if hub in have else ties.twin_of(hub, have)
            rows = base_rows if stored is None else have[stored].shape[0]
            if rows != base_rows:
                resized.append(Resize(name, base_rows, rows))
        if resized:
            self._refuse_other_rows(resized[0])
            paths = stating_levels(self._config)
            stated = [path for path in paths if "vocab_size" in _at(self._config, path)]
            for path in stated or paths[-1:]:
                self._patches[f"{path}vocab_size"] = resized[0].rows
        return tuple(resized)

    def _refuse_other_rows(self, resized: Resize) -> None:
        """Raises `NamesError` where the base's head would stand beside a resized embedding."""
        want = self._candidate.base.pieces
        stale = [
            want[hub].name
            for hub in self._candidate.of(Verdict.FILLED)
            if (ties.is_head(hub) or ties.is_vocabulary(hub, want))
            and want[hub].shape[:1] == (resized.base_rows,)
        ]
        if stale:
            raise NamesError(
                f"{resized.name!r} has {resized.rows} rows, and {resized.base_rows} in the base; "
                f"the checkpoint does not hold {stale[0]!r}, which must have as many, and the "
                f"base's does not.",
                missing=tuple(stale),
                hint="Convert a checkpoint of the run that holds it.",
            )

    def _base_names(self, verdict: Verdict) -> tuple[str, ...]:
        want = self._candidate.base.pieces
        return tuple(dict.fromkeys(want[hub].name for hub in self._candidate.of(verdict)))


def _is_chosen(options: FitOptions) -> bool:
    return options.chosen or options.prefix is not None


def _rules(candidate: Candidate) -> tuple[str, ...]:
    """What was done to the names, in words, with the number of tensors each rule was used on."""
    rules = [f"{rule} ({count})" for rule, count in candidate.source.rules.items()]
    rules += [f"base: {rule} ({count})" for rule, count in candidate.base.rules.items()]
    return tuple(rules)


def _at(config: Mapping[str, object], level: str) -> Mapping[str, object]:
    return text_config(config) if level else config
