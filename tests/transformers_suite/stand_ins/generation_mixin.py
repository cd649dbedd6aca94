"""What ``generate`` promises, for every generative class: each way of generating equals plain arithmetic without a cache.

transformers' own mixin of this name is in no distribution; this one states the same promises by their definitions.
"""

import torch
from transformers import set_seed


NEW_TOKENS = 12  # with the prompt: past the longest segment of the suite's configurations
OPTIONS = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


class GenerationTesterMixin:
    """Generation tests for ``all_generative_model_classes``."""

    def generative_models(self):
        """Yield ``(model, input_ids)``, rows of different content, weights large enough that every key counts."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.initializer_range, config.eos_token_id = 0.3, None
            set_seed(0)
            yield model_class(config).eval().double(), inputs["input_ids"][:2].clamp(min=3)

    def continuation(self, model, tokens, attention_mask=None, steps=NEW_TOKENS):
        """Choose the likeliest token ``steps`` times, each time from a whole forward pass without a cache."""
        with torch.no_grad():
            for _ in range(steps):
                logits = model(tokens, attention_mask=attention_mask, use_cache=False).logits[:, -1]
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
                if attention_mask is not None:
                    attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(tokens), 1)], dim=1)
        return tokens

    def test_greedy_generate_equals_forward_passes_without_a_cache(self):
        for model, tokens in self.generative_models():
            expected = self.continuation(model, tokens)
            for use_cache in (True, False):
                generated = model.generate(tokens, use_cache=use_cache, **OPTIONS)
                torch.testing.assert_close(generated, expected, rtol=0, atol=0)

    def test_greedy_generate_dict_outputs_have_the_logits_of_forward_passes(self):
        for model, tokens in self.generative_models():
            output = model.generate(
                tokens, return_dict_in_generate=True, output_logits=True, output_hidden_states=True, **OPTIONS
            )
            with torch.no_grad():
                logits = model(output.sequences, use_cache=False).logits[:, tokens.shape[1] - 1 : -1]
            torch.testing.assert_close(torch.stack(output.logits, dim=1), logits.float(), rtol=1e-5, atol=1e-5)
            for step, hidden_states in enumerate(output.hidden_states):
                length = tokens.shape[1] if step == 0 else 1
                assert [x.shape for x in hidden_states] == [(2, length, model.config.hidden_size)] * 3

    def test_left_padded_generate_equals_each_row_alone(self):
        for model, tokens in self.generative_models():
            mask = torch.ones_like(tokens)
            mask[1, :3] = 0
            generated = model.generate(tokens, attention_mask=mask, **OPTIONS)
            torch.testing.assert_close(generated[:1], self.continuation(model, tokens[:1]), rtol=0, atol=0)
            torch.testing.assert_close(generated[1:, 3:], self.continuation(model, tokens[1:, 3:]), rtol=0, atol=0)

    def test_generate_from_inputs_embeds_equals_generate_from_tokens(self):
        for model, tokens in self.generative_models():
            embeds = model.get_input_embeddings()(tokens)
            generated = model.generate(inputs_embeds=embeds, **OPTIONS)
            expected = self.continuation(model, tokens)[:, tokens.shape[1] :]
            torch.testing.assert_close(generated, expected, rtol=0, atol=0)

    def test_generate_continues_from_a_returned_cache(self):
        for model, tokens in self.generative_models():
            options = {**OPTIONS, "max_new_tokens": 4, "min_new_tokens": 4}
            first = model.generate(tokens, return_dict_in_generate=True, **options)
            # Without a mask, `generate` takes every generated token equal to `pad_token_id` for padding.
            options["attention_mask"] = torch.ones_like(first.sequences)
            second = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
            torch.testing.assert_close(second, self.continuation(model, tokens, steps=8), rtol=0, atol=0)

    def test_sampling_draws_from_the_distribution_of_forward_passes(self):
        for model, tokens in self.generative_models():
            sequences = []
            for use_cache in (True, False):
                set_seed(1)
                sequences.append(model.generate(tokens, use_cache=use_cache, **{**OPTIONS, "do_sample": True}))
            torch.testing.assert_close(*sequences, rtol=0, atol=0)
            assert not torch.equal(sequences[0], self.continuation(model, tokens))

    def test_beam_search_and_beam_sampling_do_not_depend_on_the_cache(self):
        for model, tokens in self.generative_models():
            for do_sample in (False, True):
                sequences = []
                for use_cache in (True, False):
                    set_seed(1)
                    options = {**OPTIONS, "do_sample": do_sample, "num_beams": 3, "num_return_sequences": 2}
                    sequences.append(model.generate(tokens, use_cache=use_cache, **options))
                torch.testing.assert_close(*sequences, rtol=0, atol=0)

    def test_a_beam_as_wide_as_the_vocabulary_finds_the_likeliest_pair(self):
        for model, tokens in self.generative_models():
            vocabulary = model.config.vocab_size
            with torch.no_grad():
                first = model(tokens[:1]).logits[0, -1].log_softmax(-1)
                pairs = torch.cat([tokens[:1].expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
                scores = first[:, None] + model(pairs).logits[:, -1].log_softmax(-1)
            best = scores.argmax()
            options = {**OPTIONS, "max_new_tokens": 2, "min_new_tokens": 2, "num_beams": vocabulary}
            found = model.generate(tokens[:1], **options)[0, -2:]
            assert found.tolist() == [int(best // vocabulary), int(best % vocabulary)]

    def test_assisted_decoding_equals_greedy_whatever_the_assistant_proposes(self):
        for model, tokens in self.generative_models():
            set_seed(7)
            stranger = type(model)(model.config).eval().double()
            expected = self.continuation(model, tokens[:1])
            for assistant in (model, stranger):
                generated = model.generate(tokens[:1], assistant_model=assistant, **OPTIONS)
                torch.testing.assert_close(generated, expected, rtol=0, atol=0)

    def test_prompt_lookup_equals_greedy(self):
        for model, tokens in self.generative_models():
            prompt = tokens[:1].repeat(1, 3)
            generated = model.generate(prompt, prompt_lookup_num_tokens=3, **OPTIONS)
            torch.testing.assert_close(generated, self.continuation(model, prompt), rtol=0, atol=0)

    def test_chunked_prefill_equals_greedy(self):
        for model, tokens in self.generative_models():
            prompt = tokens.repeat(1, 3)
            expected = self.continuation(model, prompt)
            for size in (1, 5, 16):
                torch.testing.assert_close(
                    model.generate(prompt, prefill_chunk_size=size, **OPTIONS), expected, rtol=0, atol=0
                )

    def test_the_cache_is_bounded_by_the_pattern(self):
        for model, tokens in self.generative_models():
            output = model.generate(
                tokens, return_dict_in_generate=True, **{**OPTIONS, "max_new_tokens": 60, "min_new_tokens": 60}
            )
            cache, pattern = output.past_key_values, model.config.pattern
            assert cache.get_seq_length() == tokens.shape[1] + 59
            for layer in cache.layers:
                held = layer.keys.shape[2]
                assert held <= pattern.cache_entries(tokens.shape[1] + 59) + pattern.segment_lengths[0] < 50

    def test_reordering_and_copying_the_cache_reorders_and_copies_rows(self):
        for model, tokens in self.generative_models():
            with torch.no_grad():
                cache = model(tokens, use_cache=True).past_key_values
                cache.batch_repeat_interleave(2)
                cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
                logits = model(tokens[[1, 0, 0, 1], :1], past_key_values=cache).logits[:, -1]
                whole = torch.cat([tokens, tokens[:, :1]], dim=1)[[1, 0, 0, 1]]
                torch.testing.assert_close(logits, model(whole).logits[:, -1], rtol=1e-5, atol=1e-5)
