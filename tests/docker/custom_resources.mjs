// Documents as JSON on stdin; prints what is wrong with the custom resources among them, one line each.
import { readFileSync } from "node:fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor";

const models = { ScaledObject, ServiceMonitor };
for (const document of JSON.parse(readFileSync(0))) {
  try {
    if (document.kind in models) new models[document.kind](document).validate();
  } catch (error) {
    console.log(`${document.kind} ${document.metadata.name}: ${error.message}`);
  }
}
