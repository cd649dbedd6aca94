"""Every model class exports to a program that computes what the class computes."""

import torch


class ExportTesterMixin:
    """Export with ``torch.export``; inputs of the same shape and other values must come out equal."""

    test_torch_exportable = True

    def test_exported_program_equals_the_model(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            torch.manual_seed(0)
            model = model_class(config).eval()
            inputs = {**self._prepare_for_class(inputs, model_class), "use_cache": False}
            with torch.no_grad():
                program = torch.export.export(model, (), inputs)
                inputs["input_ids"] = inputs["input_ids"].flip(0)
                exported, expected = program.module()(**inputs), model(**inputs)
            assert expected.keys() == exported.keys()
            for name in expected:
                torch.testing.assert_close(exported[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")
