"use strict";
// The API's own page, from files that this server has.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger-ui", validatorUrl: null });
